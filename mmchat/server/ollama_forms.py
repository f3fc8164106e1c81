"""What Ollama's routes have in common: fields, options, names, times."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mmchat.server import fields
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, invalid
from mmchat.server.fields import Bool, Whole
from mmchat.server.held import Schema
from mmchat.server.models import names

# What Ollama does where a program says nothing: revived programs answer as they did.
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}


def _duration(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("input should be a duration such as 5m, or seconds")
    return value


class Options(fields.Sampled):
    """How to choose tokens. What is about llama.cpp alone (num_gpu, …) is ignored as unknown."""

    top_k: Whole | None = None
    seed: Whole | None = None
    stop: Annotated[list[fields.StopString], Field(max_length=16), fields.STRINGS] | None = None
    repetition_penalty: fields.RepetitionPenalty | None = Field(None, alias="repeat_penalty")
    num_predict: Whole | None = None
    num_ctx: Annotated[int, Field(ge=1), fields.NUMBER] | None = None

    def sampling(self, most_tokens: int, **more: Any) -> dict[str, Any]:
        """Fields of SamplingParams. most_tokens: for an answer without a limit of its own."""
        if self.num_predict is not None:  # 0 and less: what the context leaves
            more["max_new_tokens"] = self.num_predict if self.num_predict > 0 else most_tokens
        if self.top_k is not None:
            more["top_k"] = max(self.top_k, 0)
        if self.seed is not None and self.seed < 0:
            more["seed"] = None
        return DEFAULTS | self.settings(**more)


class Asked(fields.Body):
    """Fields of both routes that answer."""

    model: str = ""
    stream: Bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: Annotated[Any, BeforeValidator(_duration)] | None = None
    think: Bool | str | None = None
    logprobs: Bool | None = None
    top_logprobs: fields.Logprobs | None = None

    @property
    def chosen(self) -> Options:
        return self.options or Options()

    def settings(self, call: Call) -> dict[str, Any]:
        """Raises ApiError."""
        most = fields.most_logprobs(self.logprobs, self.top_logprobs)
        return self.chosen.sampling(call.service.model.max_seq_len, logprobs=most)

    @property
    def json_schema(self) -> Schema | None:
        """Raises ApiError."""
        if self.format in (None, ""):
            return None
        if isinstance(self.format, dict):
            return Schema("format", self.format, is_lenient=True)
        if self.format != "json":
            raise invalid("format", 'format is "json" or a JSON schema')
        return Schema("format", {"type": "object"})

    def check(self, call: Call) -> None:
        """Raises ApiError for another model, and for what no model here does."""
        check_name(call, self.model)
        if self.think and self.think != "none":
            raise invalid("think", f'"{self.model}" does not support thinking')

    def notices(self, call: Call) -> list[str]:
        """What is done otherwise than asked."""
        wanted, most = self.chosen.num_ctx, call.service.model.max_seq_len
        if wanted is None or wanted <= most:
            return []
        return [f"num_ctx {wanted} is more than the {most} of this server"]


def read(kind: type[fields.B], call: Call) -> fields.B:
    """Raises ApiError."""
    if not call.body:
        raise invalid(None, "missing request body")
    return fields.read(kind, call.body)


def check_name(call: Call, asked: str) -> None:
    """Raises ApiError unless the served model has this name."""
    if not asked:
        raise invalid("model", "model is required")
    name = asked.casefold()
    known = {one.casefold() for one in names(call)}
    theirs = call.service.model.spec.family.ollama_name
    if not ({name, name.removesuffix(":latest")} & known or name.partition(":")[0] == theirs):
        raise ApiError("model_not_found", f"model '{asked}' not found", "model")


def rfc3339(at: datetime | None = None) -> str:
    """A time of UTC, now by default, as Go's programs read it."""
    at = at or datetime.now(UTC)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")
