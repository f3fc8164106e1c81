"""What OpenAI's routes have in common: fields, ids, usage, log-probabilities, what is refused."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from mmchat.engine.events import Finished, TokenLogprob
from mmchat.errors import quoted
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, invalid
from mmchat.server.fields import Body, Bool, Flag, Logprobs, Sampled, Tools
from mmchat.server.held import Plan, Schema, plan_of
from mmchat.server.models import is_known, names
from mmchat.server.stream import Fields

# Fields that would change the answer, and the values that change nothing.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "modalities": (["text"],),
    "audio": (), "prediction": (), "web_search_options": (), "functions": ([],),
    "function_call": ("none", "auto"),
}  # fmt: skip


class StreamOptions(Body):
    include_usage: Bool = False


class Streamed(Sampled):
    """A request whose answer may be streamed."""

    stream: Flag = False
    stream_options: StreamOptions = StreamOptions()


class Chatted(Streamed):
    """A request for a message, which may be calls of tools."""

    tools: Tools = []
    tool_choice: Any = "auto"
    parallel_tool_calls: Bool = True
    flat_tools: ClassVar[bool] = False  # without `function` around each
    top_logprobs: Logprobs | None = None

    @property
    def plan(self) -> Plan:
        choice, parallel = self.tool_choice, self.parallel_tool_calls
        return plan_of(self.tools, choice, parallel, self.flat_tools)


class JsonSchema(Body):
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: Bool | None = None

    def held(self, param: str) -> Schema | None:
        """What the text must be. param: the field of this. Raises ApiError."""
        if self.json_schema is None:
            raise invalid(f"{param}.schema", f"{param}.schema is missing")
        return Schema(f"{param}.schema", self.json_schema, is_lenient=self.strict is False)


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]

    def held(self, param: str) -> Schema | None:
        if self.type == "text":
            return None
        if self.type == "json_object" and self.json_schema is None:
            return Schema(param, {"type": "object"})
        return super().held(param)


def refuse_unsupported(
    body: Mapping[str, Any], fields: Mapping[str, tuple[Any, ...]] = _WITHOUT_EFFECT
) -> None:
    """Raises ApiError for what is not done here and may not be left out silently."""
    for name, harmless in fields.items():
        value = body.get(name)
        same = (value == one and type(value) is type(one) for one in harmless)
        if value is not None and not any(same):
            raise ApiError("unsupported_parameter", f"{name} is not supported here", name)


def head(call: Call, kind: str, prefix: str) -> Fields:
    """What all chunks of one answer have in common."""
    return {
        "id": prefix + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": served_name(call),
        "system_fingerprint": None,
    }


def served_name(call: Call) -> str:
    """The id of the model. Raises ApiError for another name, where that is refused."""
    asked = call.body.get("model")
    if asked is not None and not isinstance(asked, str):
        raise invalid("model", "model: input should be a valid string")
    if call.service.options.strict_model and not is_known(call, asked or ""):
        served = f"this server has {' and '.join(names(call))}"
        if not asked:
            raise invalid("model", f"model is missing; {served}")
        raise ApiError("model_not_found", f"there is no model {quoted(asked)}; {served}", "model")
    return call.served.names.listed[0]


def usage(*answers: Finished) -> Fields:
    """Of all answers to one request together."""

    def total(name: str) -> int:
        return sum(getattr(finished.usage, name) for finished in answers)

    prompt, completion = total("prompt_tokens"), total("completion_tokens")
    accepted = total("accepted_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": total("cached_tokens"),
            "image_tokens": total("image_tokens"),
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": total("draft_tokens") - accepted,
        },
    }


def timings(finished: Finished, queue_seconds: float | None) -> Fields:
    """By llama-server's names, with ours behind them."""
    counts, times = finished.usage, finished.timings
    read, seconds = counts.prompt_tokens - counts.cached_tokens, times.prefill_seconds
    return {
        "cache_n": counts.cached_tokens,
        "prompt_n": read,
        "prompt_ms": _ms(seconds),
        "prompt_per_second": round(read / seconds, 3) if seconds else None,
        "predicted_n": counts.completion_tokens,
        "predicted_ms": _ms(times.decode_seconds),
        "predicted_per_second": times.tokens_per_second,
        "vision_ms": _ms(times.vision_seconds),
        "queue_ms": _ms(queue_seconds or 0),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def logprobs(call: Call, found: Iterable[TokenLogprob], top: int | None) -> list[Fields]:
    """Of the tokens of an answer; what ended it is not part of it.

    A token may be half a character: its `bytes` are exact.
    """
    model = call.model

    def one(token_id: int, value: float) -> Fields:
        data = model.tokenizer.token_bytes(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": finite(value), "bytes": list(data)}

    def listed(entry: TokenLogprob) -> Fields:
        best = [one(*pair) for pair in entry.top[: top or 0]]
        return {**one(entry.token_id, entry.logprob), "top_logprobs": best}

    stops = model.processor.stop_ids
    return [listed(entry) for entry in found if entry.token_id not in stops]


def choice(said: Fields, logprobs: Any = None, reason: str | None = None, index: int = 0) -> Fields:
    """One of the answers, or a piece of it."""
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


def finite(value: float) -> float:
    """A log-probability as JSON can say it; OpenAI gives the impossible this one."""
    return value if math.isfinite(value) else -9999.0
