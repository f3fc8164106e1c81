"""What OpenAI's routes have in common: ids, usage, log-probabilities, fields that are refused."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mmchat.engine.events import Finished, TextDelta, TokenLogprob
from mmchat.server.errors import ApiError

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel
    from mmchat.server.call import Call

FINISH_REASONS = {
    "stop": "stop", "stop_string": "stop", "length": "length",
    "interrupted": "length",  # by the end of the server: else nobody reads it
}  # fmt: skip
# Fields that would change the answer, and the values that change nothing.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "modalities": (["text"],),
    "audio": (), "prediction": (), "web_search_options": (), "functions": ([],),
    "function_call": ("none", "auto"),
}  # fmt: skip


def refuse_unsupported(
    body: Mapping[str, Any], fields: Mapping[str, tuple[Any, ...]] = _WITHOUT_EFFECT
) -> None:
    """Raises ApiError for what is not done here and may not be left out silently."""
    for name, harmless in fields.items():
        value = body.get(name)
        same = (value == one and type(value) is type(one) for one in harmless)
        if value is not None and not any(same):
            raise ApiError("unsupported_parameter", f"{name} is not supported here", name)


def head(call: Call, kind: str, prefix: str) -> dict[str, Any]:
    """What all chunks of one answer have in common."""
    return {
        "id": prefix + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": served_name(call, call.body.get("model")),
        "system_fingerprint": None,
    }


def served_name(call: Call, asked: Any) -> str:
    """The id of the model. Raises ApiError for another name, where that is refused."""
    spec = call.service.model.spec
    if asked is not None and not isinstance(asked, str):
        raise ApiError("invalid_value", "model: input should be a valid string", "model")
    names = {name.casefold() for name in (spec.name, spec.repo or "", *spec.aliases)}
    if call.service.options.strict_model and (asked or "").casefold() not in names:
        raise ApiError("model_not_found", f"this server has the model {spec.name}", "model")
    return spec.name


def usage(*answers: Finished) -> dict[str, Any]:
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


def timings(finished: Finished, queue_seconds: float | None) -> dict[str, Any]:
    """By llama-server's names, with ours behind them."""
    counts, times = finished.usage, finished.timings
    read = counts.prompt_tokens - counts.cached_tokens
    return {
        "cache_n": counts.cached_tokens,
        "prompt_n": read,
        "prompt_ms": _ms(times.prefill_seconds),
        "prompt_per_second": _rate(read, times.prefill_seconds),
        "predicted_n": counts.completion_tokens,
        "predicted_ms": _ms(times.decode_seconds),
        "predicted_per_second": times.tokens_per_second,
        "vision_ms": _ms(times.vision_seconds),
        "queue_ms": _ms(queue_seconds or 0),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 3) if seconds else None


def entries(deltas: Iterable[TextDelta]) -> list[TokenLogprob]:
    return [delta.logprob for delta in deltas if delta.logprob is not None]


def logprobs(model: LoadedModel, found: Iterable[TokenLogprob], top: int) -> list[dict[str, Any]]:
    """Of the tokens of an answer; what ended it is not part of it.

    A token may be half a character: its `bytes` are exact.
    """

    def one(token_id: int, value: float) -> dict[str, Any]:
        data = model.tokenizer.token_bytes(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": finite(value), "bytes": list(data)}

    stops = model.processor.stop_ids
    return [
        {
            **one(entry.token_id, entry.logprob),
            "top_logprobs": [one(*pair) for pair in entry.top[:top]],
        }
        for entry in found
        if entry.token_id not in stops
    ]


def finite(value: float) -> float:
    """A log-probability as JSON can say it; OpenAI gives the impossible this one."""
    return value if math.isfinite(value) else -9999.0
