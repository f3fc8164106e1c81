"""Fields that bodies of several APIs have in common, as pydantic checks them.

Unknown fields are ignored, and null ones; 5.0 is 5, and true is no number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BeforeValidator, Field, StrictBool

from mmchat.conversation import ToolCall
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import UsageError
from mmchat.limits import SAMPLING, STOP_CHARACTERS
from mmchat.server.errors import invalid

MOST_TOOLS = 128
_OBJECT = re.compile(r"a valid dictionary( or instance of \w+)?")  # as pydantic says it
_KINDS = {dict: "an object", list: "a list"}
LARGEST_INTEGER = 2**53  # beyond it programs in JavaScript cannot say a number


class Body(pydantic.BaseModel):
    """A JSON object of a request."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: one for name, one in value.items() if one is not None}


B = TypeVar("B", bound=Body)


def read(kind: type[B], value: Mapping[str, Any], place: str | None = None) -> B:
    """place: the field of the value. Raises ApiError that names the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        param = ".".join(map(str, (*([place] if place else []), *first["loc"])))
        text = first["msg"].removeprefix("Value error, ")
        text = _OBJECT.sub("an object", f"{text[:1].lower()}{text[1:]}")
        raise invalid(param or None, f"{param}: {text}" if param else text) from None


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("input should be a number")
    return value


def plain(means: Callable[[str], Any], or_kind: type = object) -> BeforeValidator:
    """A text stands for what it means; all else is of the kind that it means."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return means(value)
        if isinstance(value, or_kind):
            return value
        raise ValueError(f"input should be a string or {_KINDS[or_kind]}")

    return BeforeValidator(read)


def within(name: str) -> Any:
    """The bounds of a field of SamplingParams."""
    low, high = SAMPLING[name]
    return Field(ge=low, le=LARGEST_INTEGER if math.isinf(high) else high)


NUMBER, STRINGS = BeforeValidator(_number), plain(lambda text: [text], list)
Bool = StrictBool
_WORDS = {"true": True, "false": False}  # as torchchat sends `stream`
Flag = Annotated[StrictBool, plain(lambda text: _WORDS.get(text, text))]
Real = Annotated[float, NUMBER]
Whole = Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER), NUMBER]
Length = Annotated[Whole, within("max_new_tokens")]
Logprobs = Annotated[Whole, within("logprobs")]
StopString = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


def at_most(count: int | None, at_least: int = 0) -> Any:
    """Of a list. It ends at its first fault, and at its length: all others wait meanwhile."""
    return Field(fail_fast=True, min_length=at_least, max_length=count)


Stops = Annotated[list[StopString], at_most(4), STRINGS]
Strings = Annotated[list[str], at_most(None)]
Tools = Annotated[list[dict[str, Any]], at_most(MOST_TOOLS)]


def _speculate(value: Any) -> Any:
    try:
        SamplingParams(speculate=value)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("speculate ")) from None
    return value


class Sampled(Body):
    """Settings that have one name in OpenAI's routes and here."""

    temperature: Annotated[Real, within("temperature")] | None = None
    top_p: Annotated[Real, within("top_p")] | None = None
    top_k: Annotated[Whole, within("top_k")] | None = None
    min_p: Annotated[Real, within("min_p")] | None = None
    frequency_penalty: Annotated[Real, within("frequency_penalty")] | None = None
    presence_penalty: Annotated[Real, within("presence_penalty")] | None = None
    repetition_penalty: Annotated[Real, within("repetition_penalty")] | None = None
    seed: Annotated[int, within("seed"), NUMBER] | None = None
    stop: Stops | None = None
    speculate: Annotated[Any, BeforeValidator(_speculate)] = None

    def settings(self, **more: Any) -> dict[str, Any]:
        """Fields of SamplingParams that were given, and `more` of them, where not None."""
        given = {name: getattr(self, name) for name in Sampled.model_fields} | more
        given["stop"] = tuple(self.stop) if self.stop else None
        return {name: value for name, value in given.items() if value is not None}


def most_logprobs(wanted: bool, top: int | None) -> int | None:
    """How many of the most probable tokens the engine tells of; there is no answer of none.

    wanted: the field logprobs, or what says the same. Raises ApiError.
    """
    if top and not wanted:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true beside it")
    return max(top or 0, 1) if wanted else None


def _arguments(value: Any) -> Any:
    """JSON text, for which Ollama's programs send an object, and some an empty string for none."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "{}" if value == "" else value


class _Function(Body):
    name: str
    arguments: Annotated[str, BeforeValidator(_arguments)] = "{}"


class _EarlierCall(Body):
    function: _Function


class Calling(Body):
    """A message with calls of tools, which came earlier."""

    tool_calls: Annotated[list[_EarlierCall], at_most(MOST_TOOLS)] = []

    @property
    def calls(self) -> list[ToolCall]:
        functions = [one.function for one in self.tool_calls]
        return [ToolCall(function.name, function.arguments) for function in functions]
