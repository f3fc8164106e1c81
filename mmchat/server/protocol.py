"""HTTP as uvicorn speaks it by h11, with an end to everything that a client can be slow at."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmchat import limits
from mmchat.server.options import is_loopback

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


class Protocol(H11Protocol):
    """Ends connections that do not send their request in time, or do not read their answer."""

    _deadline: asyncio.TimerHandle | None = None
    _phase: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._is_one_too_many():
            transport.write(_FULL)
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._read_on()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch()

    def _is_one_too_many(self) -> bool:
        if len(self.connections) > limits.CONNECTIONS:
            return True
        if self.client is None or is_loopback(self.client[0]):  # a proxy, or who shares the machine
            return False
        clients = (getattr(other, "client", None) for other in self.connections)
        same = sum(1 for client in clients if client and client[0] == self.client[0])
        return same > limits.CONNECTIONS_PER_ADDRESS

    def _read_on(self) -> None:
        """uvicorn reads nothing while a next request waits, and would not see its client go."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or self.conn.their_state is not h11.DONE:
            return
        if len(self.conn.trailing_data[0]) > limits.REQUEST_HEADER_BYTES:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _watch(self) -> None:
        """A deadline for what is awaited of the client: it is not put off by what drips in."""
        cycle, phase, seconds = self.cycle, None, 0.0
        if self.transport.is_closing():
            pass
        elif self.flow.write_paused:  # it has not read what it was sent
            phase, seconds = "answer", limits.UNREAD_SECONDS
        elif cycle is None or cycle.response_complete:
            phase, seconds = ("headers", id(cycle)), limits.HEADER_SECONDS
        elif cycle.more_body:
            phase, seconds = ("body", id(cycle)), self._body_seconds()
        if phase == self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort) if phase else None

    def _body_seconds(self) -> float:
        """By the length that is announced; it is refused where it is too large."""
        length = dict(self.headers).get(b"content-length", b"")
        size = int(length) if length.isdigit() and len(length) < 18 else limits.REQUEST_BYTES
        return limits.BODY_SECONDS + min(size, limits.REQUEST_BYTES) / limits.MIB
