"""Who may ask, and in what form: one application around all routes, so that none can forget it."""

from __future__ import annotations

import hmac
import re
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmchat import limits
from mmchat.server import log
from mmchat.server.call import OWNER, TOKENS, error_response
from mmchat.server.errors import ApiError
from mmchat.server.options import is_loopback
from mmchat.server.service import Service

GONE = 499  # in the log: the client went before there was an answer
METHODS = ("GET", "HEAD", "POST", "OPTIONS")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
# Of Ollama: a server of models was emptied that way, and nothing is embedded here
_NOT_DONE = re.compile(
    r"POST /api/(push|create|copy|delete|embed|embeddings)"
    r"|DELETE /api/delete|(HEAD|POST) /api/blobs/[^/]+"
)
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_SINGLE = (
    "host", "origin", "sec-fetch-site", "content-length", "content-type", "content-encoding",
    "authorization", "x-api-key",
)  # fmt: skip
_LENGTHS = frozenset({"content-length", "transfer-encoding"})
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin",
}
_TOKENS = re.compile(r"[\w, -]{1,1024}", re.ASCII)


class Checks:
    """Refuses before the body is read. What may pass has its owner in the scope.

    open_paths: what anybody may see, without a key.
    """

    def __init__(self, app: ASGIApp, service: Service, open_paths: frozenset[str]) -> None:
        self._app, self._open_paths = app, open_paths
        self._options = options = service.options
        self._metrics = service.metrics
        self._keys = [(name, key.encode()) for name, key in options.keys.items()]
        self._hosts = _LOCAL | {_bracketed(host.lower()) for host in options.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, route = time.perf_counter(), 0, "(refused)"

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                missing = (pair for pair in _HEADERS.items() if pair[0] not in present)
                cors = self._cors(scope)
                message = {**message, "headers": [*message["headers"], *missing, *cors]}
            await send(message)

        try:
            response = self._refusal(scope)
            if response is None:
                route = "(unknown)"
                await self._app(scope, receive, guarded)
            else:
                await response(scope, receive, guarded)
        except Exception as failure:
            log.bug(failure)
            if not status:
                response = error_response(ApiError("server_error"), scope["path"])
                await response(scope, receive, guarded)
        method = scope["method"] if scope["method"] in (*METHODS, "DELETE") else "-"
        route = f"{method} {getattr(scope.get('endpoint'), 'route', route)}"
        seconds = time.perf_counter() - begin
        self._metrics.requests[_api(scope["path"]), status or GONE] += 1
        log.request(scope.get(OWNER, ""), route, status or GONE, scope.get(TOKENS, 0), seconds)

    def _refusal(self, scope: Scope) -> Response | None:
        asked = Request(scope)
        try:
            _check_form(asked)
            self._check_place(asked)
            if asked.method == "OPTIONS":
                return self._preflight(asked.headers)
            scope[OWNER] = self._owner(asked)
            if _is_not_done(asked):  # whatever its body is, which may be a model
                raise ApiError("not_implemented")
            _check_body(asked)
        except ApiError as error:
            response = error_response(error, scope["path"])
            if asked.method not in ("GET", "HEAD") or _LENGTHS & {*asked.headers}:
                # it may have a body, which is not read: nothing behind it can be
                response.headers["connection"] = "close"
            return response
        return None

    def _check_place(self, asked: Request) -> None:
        """Against pages that have their own name lead here, and pages that ask from elsewhere."""
        host, origin = asked.headers.get("host"), asked.headers.get("origin")
        if not self._is_allowed(host, asked):
            raise ApiError("host_not_allowed")
        if origin in self._options.allowed_origins:
            return
        same = (None, f"http://{host}".lower(), f"https://{host}".lower())
        site = asked.headers.get("sec-fetch-site")
        if (origin and origin.lower()) not in same or site in ("cross-site", "same-site"):
            raise ApiError("origin_not_allowed")

    def _is_allowed(self, host: str | None, asked: Request) -> bool:
        if host is None:  # as HTTP/1.0 may have it
            is_local = asked.client is not None and is_loopback(asked.client.host)
            return is_local and "origin" not in asked.headers
        found, server = _HOST.fullmatch(host), asked.scope.get("server")
        # the address that was connected to: no name can be made to say it
        bound = {_bracketed(server[0].lower())} if server else set()
        if found is None or int(found[2] or 0) > 65_535:
            return False
        return found[1].lower() in self._hosts | bound

    def _preflight(self, asked: Headers) -> Response:
        if asked.get("origin") not in self._options.allowed_origins:
            raise ApiError("origin_not_allowed")
        headers = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
        wanted = asked.get("access-control-request-headers", "")
        if _TOKENS.fullmatch(wanted):
            headers["access-control-allow-headers"] = wanted
        return Response(status_code=204, headers=headers)

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        if not self._options.allowed_origins:
            return []
        origin = Headers(scope=scope).get("origin", "")
        is_allowed = origin in self._options.allowed_origins
        allowed = [(b"access-control-allow-origin", origin.encode("latin-1"))] if is_allowed else []
        return [(b"vary", b"Origin"), *allowed]

    def _owner(self, asked: Request) -> str:
        """The name of the key; "" where there are none. Raises ApiError."""
        if not self._keys or asked.scope["path"] in self._open_paths:
            return ""
        kind, _, given = asked.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = asked.headers.get("x-api-key", "")
        data, owner = given.strip().encode(), None
        for name, key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(data, key):
                owner = name
        if owner is None:
            raise ApiError("invalid_api_key")
        return owner


def _check_form(asked: Request) -> None:
    headers = asked.headers
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > limits.REQUEST_HEADERS or size > limits.REQUEST_HEADER_BYTES:
        raise ApiError("headers_too_large")
    for name in _SINGLE:
        if len(headers.getlist(name)) > 1:
            raise ApiError("invalid_request", f"there are two headers {name}")
    if asked.method not in METHODS and not _is_not_done(asked):
        raise ApiError("method_not_allowed")
    if not asked.scope["path"].startswith("/"):
        raise ApiError("invalid_request", "the target must be a path")
    if "content-length" in headers and "transfer-encoding" in headers:
        raise ApiError("invalid_request", "Content-Length and Transfer-Encoding exclude another")


def _is_not_done(asked: Request) -> bool:
    return _NOT_DONE.fullmatch(f"{asked.method} {asked.scope['path']}") is not None


def _check_body(asked: Request) -> None:
    headers = asked.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("unsupported_media_type", "send the body without Content-Encoding")
    length = headers.get("content-length", "0")
    if len(length) > 18 or not length.isdecimal() or int(length) > limits.REQUEST_BYTES:
        raise ApiError("body_too_large")
    if asked.method != "POST" and (int(length) or "transfer-encoding" in headers):
        raise ApiError("invalid_request", f"{asked.method} takes no body; send none, or POST it")
    # A form of a page can send text without asking first, but not JSON. Programs may call it as
    # they like; browsers say who they are.
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_browser = any(name == "origin" or name.startswith("sec-fetch-") for name in headers)
    if asked.method == "POST" and is_browser and kind != "application/json":
        raise ApiError("unsupported_media_type", "send JSON: Content-Type: application/json")


def _api(path: str) -> str:
    """As metrics name it."""
    first = path.partition("/")[2].partition("/")[0]
    is_openai = first in ("v1", "chat", "completions", "responses", "models")
    return "openai" if is_openai else {"api": "ollama"}.get(first, "other")


def _bracketed(host: str) -> str:
    """An address as a Host header says it."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
