"""One request while it is served: its body, its owner, and its end if the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmchat import limits, strict_json
from mmchat.engine.events import Timings
from mmchat.server.errors import ApiError, logged
from mmchat.server.service import Served, Service, T
from mmchat.server.stream import Json

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

# Of the scope: the name of the key that was given, "" without keys; and tokens of the answers
OWNER, TOKENS = "mmchat.owner", "mmchat.tokens"


class Call:
    """What a handler gets. body: the JSON object that was sent, {} if nothing was.

    opened: what ends with the call, however it ends. waiting: what ends when its answer begins.
    timings: they begin with it.
    """

    def __init__(self, service: Service, scope: Scope, receive: Receive) -> None:
        self.service = service
        self.request = Request(scope, receive)
        self.owner: str = scope.get(OWNER, "")
        self.body: dict[str, Any] = {}
        self.opened = ExitStack()
        self.waiting = self.opened.enter_context(ExitStack())
        self.timings = Timings()
        self._is_served = self._is_large = False

    def serve(self) -> None:
        """It is one more request of its owner, however many answers it has. Raises ApiError."""
        if not self._is_served:
            self.opened.enter_context(self.service.serving(self.owner))
            self._is_served = True

    def count(self, tokens: int) -> None:
        """So many more were written, for the log."""
        scope = self.request.scope
        scope[TOKENS] = scope.get(TOKENS, 0) + tokens

    @cached_property
    def served(self) -> Served:
        """What is asked: the model that the body names, or the first. Raises ApiError."""
        return self.service.served(self.body.get("model") or self.body.get("name"))

    @property
    def model(self) -> LoadedModel:
        """Raises ApiError."""
        return self.served.model

    @property
    def path(self) -> str:
        return self.request.scope["path"]

    async def read(self) -> None:
        """Read the body. Raises ApiError, ClientDisconnect."""
        data = bytearray()
        hold = self.waiting.enter_context(self.service.holding())
        async for chunk in self.request.stream():
            data += chunk
            if len(data) > limits.REQUEST_BYTES:
                raise ApiError("body_too_large")
            hold(len(chunk))  # as it comes: a slow one takes as much memory
        if not data:
            return
        self._is_large = len(data) > limits.LARGE_REQUEST_BYTES
        try:
            self.body = await self.digest(strict_json.parse_object, bytes(data))
        except ValueError as error:  # its text is ours
            raise ApiError("invalid_json", f"the body: {error}") from None

    async def digest(self, work: Callable[..., T], *args: Any) -> T:
        """Do something with the body: in a thread if it is large, since all others would wait."""
        return await self.service.apart(lambda: work(*args)) if self._is_large else work(*args)


Handler = Callable[[Call], Awaitable[Response]]


class Endpoint:
    """A handler as an application: its errors become answers, and it ends when the client goes."""

    def __init__(self, service: Service, handler: Handler, route: str) -> None:
        self._service, self._handler = service, handler
        self.route = route  # for the log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self._service, scope, receive)
        with call.opened:
            try:
                if scope["method"] == "POST":
                    await call.read()
            except ClientDisconnect:
                return
            except ApiError as error:
                await error_response(error, call.path)(scope, receive, send)
                return
            if await _is_left(receive, self._answer(call, send)):
                call.service.metrics.counts["requests_cancelled_total"] += 1

    async def _answer(self, call: Call, send: Send) -> None:
        try:
            response = await self._handler(call)
        except Exception as failure:
            response = error_response(logged(failure), call.path)
        await response(call.request.scope, call.request.receive, send)


def error_response(error: ApiError, path: str) -> Response:
    """In the form of the API of `path`. Ollama says 503 where too many wait."""
    is_full = error.status == 429 and path.startswith("/api/")
    return Json(error.in_form_of(path), 503 if is_full else error.status, error.headers)


async def _is_left(receive: Receive, work: Awaitable[None]) -> bool:
    """Do the work, but cancel it if the client goes; whether it went.

    Its body was read before, if it may have one.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        is_left = not tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    return is_left
