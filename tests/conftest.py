"""Shared by all tests; small fixtures only."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kinds import (  # noqa: F401 - hooks
    pytest_configure,
    pytest_runtest_call,
    pytest_runtest_setup,
)

# Workers and the processes of tests compile what they import once for all, not each for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# A shell's background job ignores SIGINT, nohup ignores SIGHUP, and every child would inherit it.
for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        usual = signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL
        signal.signal(ignored, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the longest timeouts go first: one begun last would leave cores idle."""
    longest: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0), mark.args[0] if mark else 0)
    items.sort(key=lambda item: -longest[item.path])


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


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--offline` holds for the process that it was given to: here, for all tests behind it."""
    monkeypatch.delenv("MMCHAT_OFFLINE", raising=False)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The defaults of whoever runs the tests do not count, nor what Ollama has there."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path_factory.getbasetemp() / "no-ollama"))
    for name in ("MODEL", "QUANTIZE", "DEVICE"):
        monkeypatch.delenv(f"MMCHAT_{name}", raising=False)


def pytest_collection_finish() -> None:
    """What was imported lives to the end: no later search for garbage need look through it."""
    gc.collect()
    gc.freeze()
