"""Shared by all tests; small fixtures only."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# A shell's background job ignores SIGINT, nohup ignores SIGHUP, and every child would inherit it.
for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        usual = signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL
        signal.signal(ignored, usual)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections to other machines fail: no test may need one."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = ipaddress.ip_address(address[0])
            if not host.is_loopback:
                raise AssertionError(f"a test tried to connect to {host}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
