"""A connection with two time limits: between two bytes, and for everything together."""

from __future__ import annotations

import io
import socket
import time

from mmchat import limits


class DeadlineSocket:
    """What http.client needs of a socket, every call bounded. The owner closes the real socket.

    A socket's own timeout bounds a single call only, so that a server which sends one byte every
    few seconds would hold the reader forever. deadline: on the clock of `time.monotonic`.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def arm(self) -> socket.socket:
        """The real socket with its timeout set for the next call. Raises TimeoutError."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(min(remaining, limits.FETCH_IDLE_SECONDS))
        return self._connection

    def sendall(self, data: bytes) -> None:
        self.arm().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        if mode != "rb":
            raise ValueError(mode)
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Nothing: an answer is still read after the client let go of its connection."""


class _Reader(io.RawIOBase):
    def __init__(self, source: DeadlineSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._source.arm().recv_into(buffer)
