"""The routes, each with its handler, and the checks around all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mmchat.server import models, ollama, openai_chat, openai_completions, page, responses
from mmchat.server.call import Endpoint, Handler, error_response
from mmchat.server.checks import Checks
from mmchat.server.errors import ApiError
from mmchat.server.metrics import health, metrics
from mmchat.server.service import Service

# Open to everybody: that the server lives, and the page, which knows nothing without a key.
OPEN_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", page.root),
    ("GET", "/health", health),
    ("GET", "/healthz", health),
    ("GET", "/v1/health", health),
)
_OPENAI: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/models", models.list_models),
    ("GET", "/models/{id:path}", models.one_model),
    ("POST", "/chat/completions", openai_chat.chat_completions),
    ("POST", "/completions", openai_completions.completions),
    ("POST", "/responses", responses.responses),
)
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    # some programs leave out /v1, as rtp-llm's own do
    *(
        (method, begin + path, handler)
        for begin in ("/v1", "")
        for method, path, handler in _OPENAI
    ),
    ("POST", "/page/tiles", page.tiles),
    ("POST", "/page/heat", page.heat),
    ("GET", "/metrics", metrics),
    ("POST", "/api/chat", ollama.chat),
    ("POST", "/api/generate", ollama.generate),
    ("GET", "/api/tags", models.tags),
    ("POST", "/api/show", models.show),
    ("GET", "/api/ps", models.ps),
    ("GET", "/api/version", models.version),
    ("POST", "/api/pull", models.pull),
)


def make_app(service: Service) -> ASGIApp:
    """The application of all ports."""
    statics = sorted(page.files().keys() - {"/"}) if service.options.page else []
    opened = [*OPEN_ROUTES, *(("GET", path, page.static) for path in statics)]
    routes = [
        Route(path, Endpoint(service, handler, path), methods=[method])
        for method, path, handler in (*opened, *ROUTES)
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return Checks(app, service, frozenset(path for _, path, _ in opened))


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "server_error")
    return error_response(ApiError(code), request.scope["path"])
