"""The kinds of tests: a usual one runs within this process, `-m` names the others.

A usual test that starts a process, opens a pseudo-terminal, sends a signal or serves on a socket
fails for want of the marker `process`. What the package starts wherever it decodes a picture or
compiles code is free to all: hardly a test of either could do without.
"""

from __future__ import annotations

import _posixsubprocess
import os
import sys
from collections.abc import Container, Iterable, Iterator
from types import FrameType
from typing import Any

import pytest

# What `-m KIND` selects: a test of two kinds is of the one that costs more.
SELECTED = {
    "process": "process and not slow and not gpu and not checkpoint",
    "slow": "slow and not gpu and not checkpoint",
}
LEAVES = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.system",
    "signal.pthread_kill",
    "socket.bind",
    "subprocess.Popen",
}
# What Python tells no audit hook.
UNTOLD = ((os, "openpty"), (_posixsubprocess, "fork_exec"))
FREE = (
    "/mmchat/images/worker/__init__.py",
    "/mmchat/quant/kernels/native.py",
    "/multiprocessing/resource_tracker.py",  # Python's own, begun by the first lock
    "/torch/_inductor/",
)

_seen: list[str] = []  # how the test that runs now left this process


def some(values: Iterable[Any], usual: Container[Any]) -> list[Any]:
    """Values for `parametrize`: tests of those that are not in `usual` are slow."""
    return [v if v in usual else pytest.param(v, marks=pytest.mark.slow) for v in values]


def _is_free(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(path in frame.f_code.co_filename for path in FREE):
            return True
        frame = frame.f_back
    return False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _is_free(sys._getframe(2)):
        _seen.append(f"{event}{arguments!r:.200}")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in LEAVES:
        return
    asks = event in ("os.kill", "os.killpg") and arguments[1] == 0  # whether a process is there
    is_local = event == "socket.bind" and not isinstance(arguments[1], tuple)  # has no port
    if not (asks or is_local):
        _note(event, arguments)


def _watch(module: Any, name: str) -> None:
    real = getattr(module, name)

    def call(*arguments: Any) -> Any:
        _note(name, arguments[:1])
        return real(*arguments)

    setattr(module, name, call)


def pytest_configure(config: pytest.Config) -> None:
    config.option.markexpr = SELECTED.get(config.option.markexpr, config.option.markexpr)
    sys.addaudithook(_audit)
    for module, name in UNTOLD:
        _watch(module, name)


def pytest_runtest_setup() -> None:
    _seen.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield
    if _seen and not any(map(item.get_closest_marker, ("process", "slow", "gpu", "checkpoint"))):
        pytest.fail(f"leaves this process; mark it `process`: {_seen[0]}", pytrace=False)
