"""Calls an application as a server does, with headers and bodies that no client would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    """read: bytes of the body that were taken."""

    status: int
    headers: dict[str, str]
    body: bytes
    read: int

    def json(self) -> Any:
        return json.loads(self.body)


def scope(
    method: str,
    path: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    host: str | None = "localhost",
    client: tuple[str, int] | None = ("127.0.0.1", 50_000),
) -> dict[str, Any]:
    pairs = [*([("host", host)] if host is not None else []), *headers]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in pairs],
        "client": client,
        "server": ("127.0.0.1", 5000),
    }


async def call(
    app: Any,
    asked: dict[str, Any],
    chunks: Iterable[bytes] = (b"",),
    gone: asyncio.Event | None = None,
    on_send: Callable[[bytes], None] = lambda data: None,
) -> Answer:
    """gone: when the client goes; it stays if None."""
    read = 0
    sent: list[dict[str, Any]] = []

    async def messages() -> AsyncIterator[dict[str, Any]]:
        nonlocal read
        parts = [*chunks]
        for i, chunk in enumerate(parts):
            read += len(chunk)
            yield {"type": "http.request", "body": chunk, "more_body": i + 1 < len(parts)}

    coming = messages()

    async def receive() -> dict[str, Any]:
        async for message in coming:
            return message
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        on_send(message.get("body", b""))

    await app(asked, receive, send)
    if not sent:
        return Answer(0, {}, b"", read)
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], headers, body, read)


def ask(app: Any, method: str, path: str, *args: Any, body: Any = None, **more: Any) -> Answer:
    """`call` in an event loop of its own. body: bytes, or what becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
    return asyncio.run(call(app, scope(method, path, *args, **more), [data]))
