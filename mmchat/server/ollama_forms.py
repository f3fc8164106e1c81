"""What Ollama's routes have in common: names, options, JSON schemas, times."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mmchat.server.ask import Answering
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import (
    NUMBER,
    Body,
    Bool,
    Logprobs,
    MinP,
    Penalty,
    Real,
    RepetitionPenalty,
    StopString,
    Temperature,
    TopP,
    Whole,
    strings,
)
from mmchat.server.held import Schema
from mmchat.server.models import names

MOST_STOPS = 16
# What Ollama does where a program says nothing: revived programs answer as they did.
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
Stops = Annotated[
    list[StopString], Field(fail_fast=True, max_length=MOST_STOPS), BeforeValidator(strings)
]


def _duration(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("input should be a duration such as 5m, or seconds")
    return value


Duration = Annotated[Any, BeforeValidator(_duration)]


class Options(Body):
    """How to choose tokens. The second part is accepted without effect: it is about llama.cpp."""

    temperature: Temperature | None = None
    top_k: Whole | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    seed: Whole | None = None
    stop: Stops | None = None
    num_predict: Whole | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    num_ctx: Annotated[int, Field(ge=1), NUMBER] | None = None

    num_keep: Whole | None = None
    typical_p: Real | None = None
    repeat_last_n: Whole | None = None
    num_batch: Whole | None = None
    num_gpu: Whole | None = None
    main_gpu: Whole | None = None
    num_thread: Whole | None = None
    use_mmap: Bool | None = None
    draft_num_predict: Whole | None = None
    mirostat: Whole | None = None
    mirostat_tau: Real | None = None
    mirostat_eta: Real | None = None

    def settings(self, most_tokens: int) -> dict[str, Any]:
        """Fields of SamplingParams. most_tokens: for an answer without a limit of its own."""
        same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in same}
        given["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        given["seed"] = self.seed if self.seed is not None and self.seed >= 0 else None
        given["stop"] = tuple(self.stop) if self.stop else None
        given["repetition_penalty"] = self.repeat_penalty
        if self.num_predict is not None:  # 0 and less: what the context leaves
            given["max_new_tokens"] = self.num_predict if self.num_predict > 0 else most_tokens
        return DEFAULTS | {name: value for name, value in given.items() if value is not None}


class Asked(Body):
    """Fields of both routes that answer."""

    model: str = ""
    stream: Bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: Duration | None = None
    think: Bool | str | None = None
    logprobs: Bool | None = None
    top_logprobs: Logprobs | None = None

    @property
    def unloads(self) -> bool:
        """Whether a request without a question says that the model may go."""
        return str(self.keep_alive).rstrip("smh") in ("0", "0.0")

    def settings(self, call: Call) -> dict[str, Any]:
        settings = (self.options or Options()).settings(call.service.model.max_seq_len)
        if self.logprobs:
            settings["logprobs"] = max(self.top_logprobs or 0, 1)
        return settings

    @property
    def num_ctx(self) -> int | None:
        return self.options.num_ctx if self.options else None

    @property
    def json_schema(self) -> Schema | None:
        if self.format is None or self.format == "":
            return None
        if isinstance(self.format, dict):
            return Schema("format", self.format, is_lenient=True)
        if self.format != "json":
            raise ApiError("invalid_value", 'format is "json" or a JSON schema', "format")
        return Schema("format", {"type": "object"})


def check_asked(call: Call, asked: Asked) -> None:
    """Raises ApiError for another model, and for what no model here does."""
    check_name(call, asked.model)
    if asked.think and asked.think != "none":
        raise ApiError("invalid_value", f'"{asked.model}" does not support thinking', "think")
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(
            "invalid_value", "top_logprobs needs logprobs: true beside it", "top_logprobs"
        )


def check_body(call: Call) -> None:
    if not call.body:
        raise ApiError("invalid_value", "missing request body")


def check_name(call: Call, asked: str) -> None:
    """Raises ApiError unless the served model has this name."""
    if not asked:
        raise ApiError("invalid_value", "model is required", "model")
    name = asked.casefold()
    known = {one.casefold() for one in names(call)}
    theirs = call.service.model.spec.family.ollama_name
    if not ({name, name.removesuffix(":latest")} & known or name.partition(":")[0] == theirs):
        raise ApiError("model_not_found", f"model '{asked}' not found", "model")


def rfc3339(at: datetime) -> str:
    """A time of UTC, as Go's programs read it."""
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def loaded(asked: Asked) -> dict[str, Any]:
    """The answer to no question: the model is here, and stays."""
    return {"done": True, "done_reason": "unload" if asked.unloads else "load"}


def notices(call: Call, asked: Asked) -> list[str]:
    """What is done otherwise than asked."""
    most = call.service.model.max_seq_len
    if asked.num_ctx is None or asked.num_ctx <= most:
        return []
    return [f"num_ctx {asked.num_ctx} is more than the {most} of this server"]


def statistics(answering: Answering, reason: str) -> dict[str, Any]:
    """Of the last line; times are nanoseconds. reason: as OpenAI says it."""
    finished = answering.finished
    counts, times = finished.usage, finished.timings
    return {
        "done": True,
        "done_reason": "stop" if reason == "tool_calls" else reason,
        "total_duration": _ns(time.perf_counter() - times.started),
        "load_duration": _ns(answering.queue_seconds or 0.0),
        "prompt_eval_count": counts.prompt_tokens,
        "prompt_eval_duration": _ns(times.vision_seconds + times.prefill_seconds),
        "eval_count": counts.completion_tokens,
        "eval_duration": _ns(times.decode_seconds),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
