"""Everything that a server answers in place of what was asked: one table, two forms."""

from __future__ import annotations

from typing import Any

from mmchat.errors import (
    ContextLengthExceeded,
    ImageError,
    MemoryError_,
    MissingExtra,
    MmchatError,
    NetworkError,
    NumericalError,
    PromptError,
    SchemaError,
    UsageError,
)

# code -> status, OpenAI's type, the text if there is no better one
_INVALID = "invalid_request_error"
_TABLE: dict[str, tuple[int, str, str]] = {
    "invalid_request": (400, _INVALID, "the request is not valid HTTP"),
    "invalid_json": (400, _INVALID, "the body is not valid JSON"),
    "invalid_value": (400, _INVALID, "a value is not valid"),
    "invalid_image": (400, _INVALID, "the picture cannot be read"),
    "image_fetch_refused": (400, _INVALID, "the picture cannot be fetched"),
    "context_length_exceeded": (400, _INVALID, "the prompt is longer than the context"),
    "unsupported_parameter": (400, _INVALID, "this is not supported here; leave it out"),
    "invalid_schema": (400, _INVALID, "the JSON schema is not supported"),
    "invalid_api_key": (401, _INVALID, "give a valid key: Authorization: Bearer KEY"),
    "host_not_allowed": (403, _INVALID, "this Host is not served; --allowed-host allows more"),
    "origin_not_allowed": (
        403,
        _INVALID,
        "pages of other origins may not ask here; --allow-origin allows one",
    ),
    "not_found": (404, _INVALID, "there is no such route"),
    "model_not_found": (404, _INVALID, "this model is not served here"),
    "method_not_allowed": (405, _INVALID, "this route has other methods"),
    "request_timeout": (408, _INVALID, "the request came too slowly"),
    "body_too_large": (413, _INVALID, "the body is too large"),
    "unsupported_media_type": (415, _INVALID, "send JSON, not compressed"),
    "headers_too_large": (431, _INVALID, "the headers are too many or too large"),
    "rate_limit_exceeded": (429, "rate_limit_error", "too many requests wait already"),
    "server_error": (500, "server_error", "the server failed; its log says where"),
    "numerical_error": (500, "server_error", "the model gave no finite numbers"),
    "not_implemented": (501, _INVALID, "this is not done over the network"),
    "overloaded": (503, "server_error", "no answer could be begun in time; try again"),
    "loading": (503, "server_error", "the model is being loaded; try again"),
    "draining": (503, "server_error", "the server is ending"),
    "out_of_memory": (503, "server_error", "memory ran out; try again, or ask for less"),
}


class ApiError(Exception):
    """An answer of one of the codes above. param: the field that is wrong.

    message: for the client, and never what an exception of others says. retry_after: seconds.
    """

    def __init__(
        self,
        code: str,
        message: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status, self.type, text = _TABLE[code]
        self.code, self.param = code, param
        self.message = message or text
        self.retry_after = 1 if retry_after is None and self.status == 503 else retry_after
        super().__init__(self.message)

    @property
    def headers(self) -> dict[str, str]:
        """Clients try 5xx again by themselves, which helps with none of the first three."""
        headers = {}
        if self.code in ("server_error", "numerical_error", "draining"):
            headers["x-should-retry"] = "false"
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return headers

    def in_form_of(self, path: str) -> dict[str, Any]:
        """As the API of this path says it: Ollama's, or OpenAI's."""
        if path.startswith("/api/"):
            return {"error": self.message}
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


_OURS: tuple[tuple[type[MmchatError], str], ...] = (
    (ContextLengthExceeded, "context_length_exceeded"),
    (PromptError, "invalid_value"),
    (SchemaError, "invalid_schema"),
    (UsageError, "invalid_value"),
    (ImageError, "invalid_image"),
    (MissingExtra, "invalid_image"),
    (NetworkError, "image_fetch_refused"),
    (NumericalError, "numerical_error"),
    (MemoryError_, "out_of_memory"),
)


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a failure is to a client: our own words, or nothing but that it failed."""
    if isinstance(error, ApiError):
        return error
    for kind, code in _OURS:
        if isinstance(error, kind):
            return ApiError(code, str(error), param)
    return ApiError("out_of_memory" if isinstance(error, MemoryError) else "server_error")
