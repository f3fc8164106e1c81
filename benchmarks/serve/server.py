"""`mmchat serve` in a process of its own, and a client of raw sockets that can go at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CHAT = "/v1/chat/completions"
_READY = re.compile(r" at http://\S+:(\d+)[: ]")
_FAULT = re.compile(r"^\S+ \w+ in \w+:\d+|^Traceback", re.M)  # as mmchat.server.log tells it


@dataclass
class Said:
    """An answer. begun, tokens: when it was asked for, and when each token came, by the wall."""

    status: int
    text: str = ""
    tokens: list[float] = field(default_factory=list)
    begun: float = 0.0
    body: dict[str, Any] = field(default_factory=dict)  # the last, or the only object

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.begun

    def longest_gap(self, begin: float, end: float) -> float:
        """Between two tokens that came together or apart, of which one came in that time."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return max((b - a for a, b in pairs if b >= begin and a <= end), default=0.0)


class Connection:
    """One request that was sent; `go` ends it at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.begun = time.perf_counter()
        self.reader, self.writer = reader, writer

    async def status(self) -> int:
        """Read the head; 0 if the server has closed."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0
        return int(head.split(b" ", 2)[1])

    async def objects(self) -> AsyncIterator[dict[str, Any]]:
        """Of a stream, or the one of a whole answer. A chunk holds whole lines."""
        async for line in self.reader:
            text = line.removeprefix(b"data: ")
            if text.startswith(b"{"):
                yield json.loads(text)

    async def said(self) -> Said:
        said = Said(await self.status(), begun=self.begun)
        async for body in self.objects():
            said.body = body
            for choice in body.get("choices", ()):
                part = choice.get("delta") or choice.get("message") or {}
                said.text += part.get("content") or ""
                listed = len((choice.get("logprobs") or {}).get("content") or ())
                count = listed or bool(part.get("content"))
                said.tokens += [time.perf_counter()] * count
        self.go(reset=False)
        return said

    def go(self, *, reset: bool) -> None:
        """Vanish: with RST, or with FIN where nothing is unread."""
        if reset and (connected := self.writer.get_extra_info("socket")) is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


class Server:
    """The built-in model behind `mmchat serve`, whose log is kept."""

    def __init__(self, process: psutil.Popen, log: Path) -> None:
        self.process, self.log, self.port = process, log, 0

    async def send(
        self, body: Any, path: str = CHAT, *, key: str = "", share: float = 1.0
    ) -> Connection:
        """share: of the body that is sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"Host: localhost\r\nX-Api-Key: {key}\r\nContent-Length: {len(data)}\r\n"
        begin = f"POST {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode()
        writer.write(begin + data[: int(len(data) * share)])
        return Connection(reader, writer)

    async def ask(self, body: Any, path: str = CHAT, *, key: str = "") -> Said:
        return await (await self.send(body, path, key=key)).said()

    async def metrics(self) -> dict[str, float]:
        """By their names without `mmchat_`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        told = (line.rsplit(" ", 1) for line in lines if line.startswith("mmchat_"))
        return {name.removeprefix("mmchat_"): float(value) for name, value in told}

    async def until(self, waiting: int, running: int | None = None) -> float:
        """Seconds until so many wait, and run. Raises TimeoutError after 60 s."""
        begin = time.perf_counter()
        async with asyncio.timeout(60):
            while True:
                found = await self.metrics()
                if found["requests_waiting"] == waiting and (
                    running is None or found["requests_running"] == running
                ):
                    return time.perf_counter() - begin
                await asyncio.sleep(0.02)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads: Linux' clock of another process."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    @property
    def held(self) -> dict[str, int]:
        """What could leak: bytes of memory, threads, open files and connections.

        Pages of files come and go as the system likes, and are not counted.
        """
        memory = self.process.memory_info()
        return {
            "memory": memory.rss - memory.shared,
            "threads": self.process.num_threads(),
            "files": self.process.num_fds(),
        }

    async def held_idle(self) -> dict[str, int]:
        """The same once the server has given back what it freed."""
        await asyncio.sleep(2)
        return self.held

    @property
    def faults(self) -> list[str]:
        """What its log says of failures that are nobody's request."""
        return _FAULT.findall(self.log.read_text(encoding="utf-8"))


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[Server]:
    """On a free port, with one thread for the model; it is killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "mmchat", "serve", "--port", "0", *options]
        set_here = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with log.open("w") as lines:
            process = psutil.Popen(command, stderr=lines, stdin=subprocess.DEVNULL, env=set_here)
        server = Server(process, log)
        try:
            while not (found := _READY.search(log.read_text(encoding="utf-8"))):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended: {log.read_text(encoding='utf-8')}")
                time.sleep(0.05)
            server.port = int(found[1])
            yield server
        finally:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
            process.wait()
