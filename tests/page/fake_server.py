"""A server as the page sees it: the routes it asks, scripted answers, and every fault to order."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mmchat.server import page

TILE = 112  # pixels, as the built-in model's
MOST_TILES = 4
TOKENS_A_TILE = 65


def tiles_of(content: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
    columns = min(MOST_TILES, -(-width // TILE))
    rows = max(1, min(MOST_TILES // columns, -(-height // TILE)))
    factor = min(columns * TILE / width, rows * TILE / height, 1)
    count = rows * columns
    canvas = f"{columns * TILE} x {rows * TILE} px, {count} tiles"
    return {
        "size": [height, width],
        "resized": [round(height * factor), round(width * factor)],
        "grid": [rows, columns],
        "tokens": count * TOKENS_A_TILE,
        "positions": 1,
        "lines": [["canvas", canvas]],
        "details": {"tile_size": TILE},
        "notices": [],
    }


class FakeServer:
    """Serves on a port of its own until it is stopped, and again on the same one when started.

    answers: texts, one a question; the last is given again and again. pause: seconds between two
    tokens. breaks: ends a stream after so many tokens, without a word. error: (status, code,
    message) instead of an answer. key: what has to be given, None for none. heat: whether the model
    tells where it looked. bodies: what was asked.
    """

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.reset()
        self.app = Starlette(
            routes=[
                Route("/page/tiles", self._tiles, methods=["POST"]),
                Route("/page/heat", self._heat, methods=["POST"]),
                Route("/health", lambda _: JSONResponse({"status": self.status})),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/{path:path}", self._file),
            ]
        )

    def reset(self) -> None:
        self.answers = ["A brown dog."]
        self.pause = 0.0
        self.breaks: int | None = None
        self.error: tuple[int, str, str] | None = None
        self.key: str | None = None
        self.status = "ok"
        self.finish = "stop"
        self.bodies: list[dict[str, Any]] = []
        self.abandoned = 0  # streams whose reader went before their end
        self.tiles_asked = 0
        self.heat = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        config = uvicorn.Config(
            self.app, port=self.port, log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the fake server could not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeServer]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    async def _file(self, request: Request) -> Response:
        content, kind = page.files()[request.url.path]
        return Response(content, headers=page.HEADERS, media_type=kind)

    def _refusal(self, request: Request) -> Response | None:
        given = request.headers.get("Authorization", "")
        if self.key is not None and given != f"Bearer {self.key}":
            return _error(401, "invalid_api_key", "this server asks for a key")
        return None

    async def _models(self, request: Request) -> Response:
        model = {"id": "tiny", "object": "model", "meta": {"n_ctx_train": 1024, "heat": self.heat}}
        if self.status == "loading":
            return _error(503, "server_error", "the model is being loaded; try again")
        return self._refusal(request) or JSONResponse({"object": "list", "data": [model]})

    async def _tiles(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        self.tiles_asked += 1
        try:
            data = (await request.json())["image_url"].partition("base64,")[2]
            return JSONResponse({"pictures": [tiles_of(base64.b64decode(data))]})
        except OSError:
            return _error(400, "invalid_image", "'image_url' is not a picture in a known format")

    async def _heat(self, request: Request) -> Response:
        """The n-th word lights the n-th of 4 x 4 places of the first picture, and no other one."""
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if self.error is not None:
            return _error(*self.error)
        await asyncio.sleep(self.pause)
        parts = [
            part for one in body["messages"] for part in one["content"] if one["role"] == "user"
        ]
        urls = [part["image_url"]["url"] for part in parts if "image_url" in part]
        sizes = [tiles_of(base64.b64decode(url.partition(",")[2]))["size"] for url in urls]
        pictures = [{"grid": [4, 4], "cell": [side / 4 for side in size]} for size in sizes]
        words = []
        for n, found in enumerate(re.finditer(r"\S+", body["answer"])):
            heat = [[float(4 * y + x == n % 16) for x in range(4)] for y in range(4)]
            seen = [{"share": 0.9, "heat": heat}, *[None] * (len(urls) - 1)]
            at = {"start": found.start(), "end": found.end()}
            words.append({"text": found[0], **at, "pictures": seen})
        return JSONResponse({"heat": {"pictures": pictures, "words": words}})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        self.bodies.append(await request.json())
        if self.error is not None:
            return _error(*self.error)
        text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        stream = self._stream(text, self.bodies[-1])
        return StreamingResponse(stream, media_type="text/event-stream")

    async def _stream(self, text: str, body: dict[str, Any]) -> AsyncIterator[str]:
        tokens = [text[at : at + 4] for at in range(0, len(text), 4)]
        done = False
        try:
            yield _event(delta={"role": "assistant", "content": ""})
            for n, token in enumerate(tokens):
                if self.breaks == n:
                    return
                yield _event(delta={"content": token}, logprobs=_logprobs(token, n, body))
                await asyncio.sleep(self.pause)
            yield _event(delta={}, finish=self.finish)
            yield f"data: {json.dumps(_totals(len(tokens)))}\n\n"
            yield "data: [DONE]\n\n"
            done = True
        finally:
            self.abandoned += not done


def _error(status: int, code: str, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def _event(delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [choice], 'usage': None})}\n\n"


def _logprobs(token: str, n: int, body: dict[str, Any]) -> Any:
    if not body.get("logprobs"):
        return None
    logprob = (-0.01, -0.4, -1.2)[n % 3]
    others = [{"token": " cat", "logprob": -2.0, "bytes": []}]
    return {"content": [{"token": token, "logprob": logprob, "bytes": [], "top_logprobs": others}]}


def _totals(tokens: int) -> dict[str, Any]:
    usage = {
        "prompt_tokens": 30,
        "completion_tokens": tokens,
        "total_tokens": 30 + tokens,
        "prompt_tokens_details": {"cached_tokens": 12},
    }
    timings = {"predicted_per_second": 41.5, "vision_ms": 118.0, "cache_n": 12}
    return {"id": "chatcmpl-1", "choices": [], "usage": usage, "timings": timings}


if __name__ == "__main__":
    fake = FakeServer()
    fake.pause = 0.02
    with fake.running():
        print(fake.url)
        while True:
            time.sleep(1)
