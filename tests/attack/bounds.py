"""Bounds on what one hostile input may take: seconds of processor time, bytes of memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0  # for one input; an endless loop or an exponential one is over it
MEMORY_BYTES = 256 * 1024**2  # above what the process had before


class OverBound(BaseException):
    """Not an Exception, so that no reader takes it for a fault of its input."""


@contextlib.contextmanager
def cpu_bound(seconds: float = CPU_SECONDS) -> Iterator[None]:
    """Raises OverBound in Python code that has run for so long."""

    def stop(*_: object) -> None:
        raise OverBound(f"over {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Peak:
    """The largest resident memory since `reset`, by the kernel's own count."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._peak()

    def grown(self) -> int:
        """Bytes above what was there at `reset`."""
        return self._peak() - self._before

    @staticmethod
    def _peak() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel counts no peak")


def in_a_child(call: Callable[[], Any], seconds: int = 20, mebibytes: int = 2048) -> Any:
    """What `call` returns in a process of its own, which is killed over its bounds, in C too."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20,) * 2)
        spent = int(sum(os.times()[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            os.write(writing, json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        raise AssertionError(f"over its bounds: wait status {status}")
    return json.loads(answer)
