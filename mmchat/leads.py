"""Arguments that other programs have: what says the same here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_SAMPLED = "sampling=mmchat.SamplingParams(…) of ask and send says that"
_SAMPLING = dict.fromkeys(
    ("generate_config", "generation_config", "temperature", "top_p", "top_k", "seed", "stop",
     "max_tokens", "max_new_tokens"),
    _SAMPLED,
)  # fmt: skip
_PICTURES = ("urls", "url", "images", "image", "image_url", "pictures")
OF_LOAD = {
    **_SAMPLING,
    **dict.fromkeys(_PICTURES, "pictures are given to ask and send"),
    **dict.fromkeys(("model", "model_id", "model_path", "repo_id"), "name=… says that"),
    **dict.fromkeys(("torch_dtype", "precision"), "dtype=… says that"),
    **dict.fromkeys(("lora", "lora_path", "adapters", "adapter_path"), "adapter=… says that"),
    "device_map": "device=… says that",
    "load_in_4bit": "quantize='int4' says that",
    "load_in_8bit": "quantize='int8' says that",
}
_OF_QUESTION = {
    **_SAMPLING,
    **dict.fromkeys(
        ("prompt", "message", "content", "query"), "the question is the first argument"
    ),
    **dict.fromkeys(("system", "system_prompt"), "model.chat(system=…) says that"),
}
OF_SEND = {**_OF_QUESTION, **dict.fromkeys(_PICTURES, "images=… takes files and addresses")}
OF_SAMPLING = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), "max_new_tokens=…"),
    "stop_sequences": "stop=…",
    "do_sample": "temperature=0 takes the likeliest token",
}
OF_ASK = {
    **_OF_QUESTION,
    **dict.fromkeys(_PICTURES, "pictures stand behind the question: ask(question, *pictures)"),
    "messages": "messages are the first argument",
}


def lead(names: Iterable[str], leads: Mapping[str, str]) -> str:
    """`; what says it here`, of the first of the names that is known; else ""."""
    return next((f"; {leads[name]}" for name in names if name in leads), "")


def with_leads(leads: Mapping[str, str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function's TypeError for an argument of another program say what does it here."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if other := next((name for name in kwargs if name in leads and name not in own), None):
                name = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{name}() has no {other!r}; {leads[other]}")
            return function(*args, **kwargs)

        own = inspect.signature(function).parameters
        return call

    return decorate
