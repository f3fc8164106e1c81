"""The routes, each with its handler."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mmchat.server import models, openai_chat
from mmchat.server.call import Call, Endpoint, Handler, error_response
from mmchat.server.errors import ApiError
from mmchat.server.service import Service
from mmchat.server.stream import Json

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{id:path}", models.one_model),
    ("POST", "/v1/chat/completions", openai_chat.chat_completions),
)


def make_app(service: Service) -> Starlette:
    """The application of all ports."""
    routes = [
        Route(path, Endpoint(service, handler), methods=[method])
        for method, path, handler in ROUTES
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


async def health(call: Call) -> Response:
    return Json({"status": "ok"})


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "server_error")
    return error_response(ApiError(code), request.scope["path"])
