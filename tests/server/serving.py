"""`mmchat serve` in a process of its own, and raw requests to it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread


@dataclass
class Served:
    """lines: what it wrote to stderr so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(*options: str, ready: bool = True, **environment: str) -> Iterator[Served]:
    """With the built-in model on a free port, unless `options` say otherwise."""
    arguments = [sys.executable, "-m", "mmchat", "serve", "--port", "0", *options]
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    served = Served(process)

    def read() -> None:
        for line in process.stderr or ():
            served.lines.append(line)

    reader = Thread(target=read, daemon=True)
    reader.start()
    try:
        while ready and not served.url:
            found = re.search(r"at (http://\S+?)[: ]+\d+ answers? at once", "".join(served.lines))
            served.url = found[1] if found else ""
            assert process.poll() is None, served.lines
            time.sleep(0.02)
        yield served
    finally:
        process.kill()
        process.wait()
        reader.join()
        if process.stderr:
            process.stderr.close()


def exchange(port: int, data: bytes, *, seconds: float = 20, end: bool = False) -> bytes:
    """What comes back until the server closes, or a complete answer is there.

    end: say that no more follows.
    """
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        came = b""
        while chunk := connection.recv(65_536):
            came += chunk
        return came


def statuses(came: bytes) -> list[int]:
    """Of each answer."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", came)]
