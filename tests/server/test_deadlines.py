"""The protocol's deadlines, without a socket: who is slow is let go, and nobody else."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import uvicorn
from uvicorn.server import ServerState

from mmchat import limits
from mmchat.server.protocol import Protocol

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"


class Transport:
    """written: what was sent. aborted: whether the connection was cut."""

    def __init__(self, address: str) -> None:
        self.written, self.aborted, self.closed = b"", False, False
        self.reads = True
        self._address = address
        self.protocol: Protocol

    def get_extra_info(self, name):
        return {"peername": (self._address, 1), "sockname": ("127.0.0.1", 5000)}.get(name)

    def write(self, data):
        self.written += data

    def abort(self):
        self.aborted = True
        self.protocol.connection_lost(ConnectionAbortedError())

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.aborted or self.closed

    def pause_reading(self):
        self.reads = False

    def resume_reading(self):
        self.reads = True


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def quick(monkeypatch):
    for name in ("HEADER_SECONDS", "BODY_SECONDS", "UNREAD_SECONDS"):
        monkeypatch.setattr(limits, name, 0.02)
    monkeypatch.setattr(limits, "MIB", 2**40)


def connect(state: ServerState, address: str = "127.0.0.1", app=app) -> SimpleNamespace:
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
    protocol = Protocol(config, state, {}, asyncio.get_running_loop())
    transport = Transport(address)
    transport.protocol = protocol
    protocol.connection_made(transport)
    return SimpleNamespace(protocol=protocol, transport=transport)


def test_who_is_slow_is_let_go(quick):
    async def run() -> list[bool]:
        state = ServerState()
        idle, head, body, dripping, unread, good = (connect(state) for _ in range(6))
        head.protocol.data_received(HEAD[:20])
        body.protocol.data_received(HEAD + b"12")
        unread.protocol.data_received(HEAD + b"1234")
        unread.protocol.pause_writing()
        good.protocol.data_received(HEAD + b"1234")
        good.protocol.pause_writing()
        good.protocol.resume_writing()
        await asyncio.sleep(0)
        while b"200 OK" not in good.transport.written:
            await asyncio.sleep(0)
        good.protocol.data_received(HEAD + b"1234")  # the same connection again
        for letter in HEAD[:60]:
            if not dripping.transport.aborted:
                dripping.protocol.data_received(bytes([letter]))
            await asyncio.sleep(0.002)
        assert good.transport.written.count(b"200 OK") == 2
        return [one.transport.aborted for one in (idle, head, body, dripping, unread)]

    assert asyncio.run(run()) == [True] * 5


def test_a_large_answer_has_its_time_to_be_read(quick, monkeypatch):
    """It is complete for the server long before its client has it all."""
    monkeypatch.setattr(limits, "UNREAD_SECONDS", 0.2)

    async def run() -> list[bool]:
        one, other = connect(ServerState()), connect(ServerState())
        for each in (one, other):
            each.protocol.data_received(HEAD + b"1234")
            each.protocol.pause_writing()
            while not each.protocol.cycle.response_complete:
                each.protocol.flow._is_writable_event.set()  # the last of it fits into the buffer
                await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        assert not one.transport.aborted
        one.protocol.resume_writing()
        await asyncio.sleep(0.05)
        return [one.transport.aborted, other.transport.aborted]  # no request came, and it reads

    assert asyncio.run(run()) == [True, False]


def test_a_client_that_sends_on_is_still_seen_to_go():
    """A byte of a next request must not hide the end of the connection."""

    ended = []

    async def waits(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.append(scope)

    async def run() -> None:
        one, many = (connect(ServerState(), app=waits) for _ in range(2))
        for each in (one, many):
            each.protocol.data_received(HEAD + b"1234")
            await asyncio.sleep(0.01)
            each.protocol.data_received(b"G")
            assert each.transport.reads
        one.protocol.data_received(b"ET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert one.transport.reads
        assert not one.transport.aborted
        one.protocol.connection_lost(None)
        many.protocol.data_received(b"x" * limits.REQUEST_HEADER_BYTES)
        assert many.transport.aborted
        await asyncio.sleep(0.01)
        assert len(ended) == 2

    asyncio.run(run())


def test_connections_are_counted_together_and_of_one_other_machine(monkeypatch):
    monkeypatch.setattr(limits, "CONNECTIONS", 6)
    monkeypatch.setattr(limits, "CONNECTIONS_PER_ADDRESS", 2)

    async def run() -> list[bool]:
        state = ServerState()
        places = ["10.0.0.1"] * 3 + ["10.0.0.2"] + ["127.0.0.1"] * 3
        found = [connect(state, place).transport for place in places]
        return [b"503" in transport.written and transport.closed for transport in found]

    # the third of the first machine is over, and the last is the seventh
    assert asyncio.run(run()) == [False, False, True, False, False, False, True]
