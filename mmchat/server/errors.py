"""Everything that a server answers in place of what was asked: one table, two forms."""

from __future__ import annotations

import re
from typing import Any

from mmchat import errors, limits
from mmchat.server import log

# code -> status, and the text if there is no better one
_TABLE: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "the request is not valid HTTP"),
    "invalid_json": (400, "the body is not valid JSON"),
    "invalid_value": (400, "a value is not valid"),
    "invalid_image": (400, "the picture cannot be read"),
    "image_fetch_refused": (400, "the picture cannot be fetched"),
    "context_length_exceeded": (400, "the prompt is longer than the context"),
    "unsupported_parameter": (400, "this is not supported here; leave it out"),
    "invalid_schema": (400, "the JSON schema is not supported"),
    "invalid_api_key": (401, "give a valid key: Authorization: Bearer KEY"),
    "host_not_allowed": (403, "this Host is not served; --allowed-host allows more"),
    "origin_not_allowed": (403, "pages of other origins may not ask; --allow-origin allows one"),
    "not_found": (404, "there is no such route"),
    "model_not_found": (404, "this model is not served here"),
    "method_not_allowed": (405, "this route has other methods"),
    "body_too_large": (413, f"the body is larger than {limits.REQUEST_BYTES // limits.MIB} MiB"),
    "unsupported_media_type": (415, "send JSON, not compressed"),
    "headers_too_large": (431, "the headers are too many or too large"),
    "rate_limit_exceeded": (429, "too many requests wait already"),
    "server_error": (500, "the server failed; its log says where"),
    "numerical_error": (500, "the model gave no finite numbers"),
    "not_implemented": (501, "models are not managed over the network, nor embedded"),
    "overloaded": (503, "no answer could be begun in time; try again"),
    "loading": (503, "the model is being loaded; try again"),
    "draining": (503, "the server is ending"),
    "out_of_memory": (503, "memory ran out; try again, or ask for less"),
}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # as OpenAI has them


class ApiError(Exception):
    """An answer of one of the codes above. param: the field that is wrong.

    message: for the client, and never what an exception of others says. retry_after: seconds.
    """

    def __init__(
        self, code: str, message: str = "", param: str | None = None, retry_after: int = 0
    ) -> None:
        self.status, text = _TABLE[code]
        self.code, self.param = code, param
        self.message = message or text
        self.retry_after = retry_after or (1 if self.status == 503 else 0)
        super().__init__(self.message)

    @property
    def headers(self) -> dict[str, str]:
        """Clients try 5xx again by themselves, which helps with none of the first three."""
        headers = {}
        if self.code in ("server_error", "numerical_error", "draining"):
            headers["x-should-retry"] = "false"
        if self.retry_after:
            headers["retry-after"] = str(self.retry_after)
        return headers

    def in_form_of(self, path: str) -> dict[str, Any]:
        """As the API of this path says it: Ollama's, or OpenAI's."""
        if path.startswith("/api/"):
            return {"error": self.message}
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(param: str | None, message: str) -> ApiError:
    """To raise where what a field says cannot be."""
    return ApiError("invalid_value", message, param)


_OPTION = re.compile(r"(?<=[ (])--(?=(max-seq-len|dtype|parallel)\b)")  # what the engine names
_OURS: dict[type[errors.MmchatError], str] = {  # the first that it is an instance of
    errors.ContextLengthExceeded: "context_length_exceeded",
    errors.PromptError: "invalid_value",
    errors.SchemaError: "invalid_schema",
    errors.UsageError: "invalid_value",
    errors.ImageError: "invalid_image",
    errors.MissingExtra: "invalid_image",
    errors.NetworkError: "image_fetch_refused",
    errors.NumericalError: "numerical_error",
    errors.MemoryError_: "out_of_memory",
}


def said(error: errors.MmchatError) -> str:
    """Its message to a client, who cannot give the options of the command line."""
    return _OPTION.sub("the server's --", str(error))


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a failure is to a client: our own words, or nothing but that it failed."""
    if isinstance(error, ApiError):
        error.param = error.param or param
        return error
    for kind, code in _OURS.items():
        if isinstance(error, kind):
            return ApiError(code, said(error), param)
    return ApiError("out_of_memory" if isinstance(error, MemoryError) else "server_error")


def logged(failure: Exception) -> ApiError:
    """The same, where it is answered: what is no fault of the client has a line in the log."""
    error = api_error(failure)
    if error.code == "server_error":
        log.bug(failure)
    return error
