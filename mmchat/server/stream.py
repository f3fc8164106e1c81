"""Answers as they are sent: one JSON, or many of them in a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mmchat.server.errors import logged

Fields = dict[str, Any]  # of a JSON object
Headers = Mapping[str, str] | None
Items = AsyncGenerator[Fields, None]  # of a stream
_NOTICE_CHARACTERS = 1_000
KEEP_ALIVE_SECONDS = 10.0  # a CPU reads a long prompt for minutes, in which proxies lose patience


def json_bytes(value: Any) -> bytes:
    """Half of a surrogate pair, as a client may send it, becomes `?`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class Json(JSONResponse):
    """One JSON object."""

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def _sse(item: Fields) -> bytes:
    """A server-sent event, whose name is its type."""
    name = f"event: {item['type']}\n".encode() if "type" in item else b""
    return name + b"data: " + json_bytes(item) + b"\n\n"


@dataclass(frozen=True)
class Form:
    """How the items of a stream are sent.

    keep_alive: what says nothing, if there is such. end: what follows the last item.
    """

    media_type: str
    encode: Callable[[Fields], bytes]
    keep_alive: bytes = b""
    end: bytes = b""


EVENTS = Form("text/event-stream", _sse, b": keep-alive\n\n")
CHUNKS = replace(EVENTS, end=b"data: [DONE]\n\n")
LINES = Form("application/x-ndjson", lambda item: json_bytes(item) + b"\n")


class Stream(Response):
    """Sends what `items` yields. An error within is its last item."""

    def __init__(self, items: Items, form: Form, headers: Headers = None) -> None:
        usual = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(None, headers={**usual, **(headers or {})})
        del self.headers["content-length"]
        self.headers["content-type"] = form.media_type
        self._items, self._form = items, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        last = self._form.end
        try:
            await self._send_items(send)
        except Exception as failure:
            last = self._form.encode(logged(failure).in_form_of(scope["path"]))
        finally:
            await self._items.aclose()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_items(self, send: Send) -> None:
        while True:
            coming = asyncio.ensure_future(anext(self._items, None))
            try:
                while not (await asyncio.wait([coming], timeout=KEEP_ALIVE_SECONDS))[0]:
                    if self._form.keep_alive:
                        await _send(send, self._form.keep_alive)
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait([coming])
            item = coming.result()
            if item is None:
                return
            await _send(send, self._form.encode(item))


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def notice_header(notices: Sequence[str]) -> dict[str, str]:
    """What is done otherwise than asked; schemas may say what no header can."""
    text = "; ".join(notices).encode("ascii", "backslashreplace").decode()
    text = "".join(char if char.isprintable() else " " for char in text)
    text = text[:_NOTICE_CHARACTERS].strip()  # h11 sends no header that begins or ends with spaces
    return {"x-mmchat-notice": text} if text else {}
