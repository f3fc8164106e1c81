"""Fields that bodies of several APIs have in common, as pydantic checks them.

`null` is as absent, unknown fields are ignored, 5.0 is 5, and true is no number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
)

from mmchat.limits import SAMPLING, STOP_CHARACTERS
from mmchat.server.errors import ApiError
from mmchat.server.tools import MOST_TOOLS

MOST_STOPS = 4
LARGEST_INTEGER = 2**53  # beyond it programs in JavaScript cannot say a number


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="ignore")


B = TypeVar("B", bound=Body)


def read(kind: type[B], value: Mapping[str, Any]) -> B:
    """Raises ApiError that names the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        text = f"{text[:1].lower()}{text[1:]}"
        raise ApiError(
            "invalid_value", f"{param}: {text}" if param else text, param or None
        ) from None


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("input should be a number")
    return value


def strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("an empty string would stop at once")
    return value


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _within(name: str) -> Any:
    low, high = SAMPLING[name]
    return Field(ge=low, le=LARGEST_INTEGER if math.isinf(high) else min(high, LARGEST_INTEGER))


NUMBER = BeforeValidator(_number)
Bool = StrictBool
Flag = Annotated[StrictBool, BeforeValidator(_flag)]  # "true" too, as torchchat sends `stream`
Whole = Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER), NUMBER]
Real = Annotated[float, NUMBER]
Length = Annotated[int, _within("max_new_tokens"), NUMBER]
Temperature = Annotated[float, _within("temperature"), NUMBER]
TopP = Annotated[float, _within("top_p"), NUMBER]
TopK = Annotated[int, _within("top_k"), NUMBER]
MinP = Annotated[float, _within("min_p"), NUMBER]
Penalty = Annotated[float, _within("frequency_penalty"), NUMBER]
RepetitionPenalty = Annotated[float, _within("repetition_penalty"), NUMBER]
Seed = Annotated[int, _within("seed"), NUMBER]
Logprobs = Annotated[int, _within("logprobs"), NUMBER]
StopString = Annotated[str, Field(max_length=STOP_CHARACTERS), BeforeValidator(_not_empty)]
# Every list ends at its first fault, and at its length: all others wait while it is looked at.
Stops = Annotated[
    list[StopString], Field(fail_fast=True, max_length=MOST_STOPS), BeforeValidator(strings)
]
Strings = Annotated[list[str], Field(fail_fast=True)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MOST_TOOLS)]


class Sampled(Body):
    """Settings that have one name in OpenAI's routes and here."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stops | None = None

    def settings(self, **more: Any) -> dict[str, Any]:
        """Fields of SamplingParams that were given, and `more` of them, where not None."""
        given = {name: getattr(self, name) for name in Sampled.model_fields} | more
        given["stop"] = tuple(self.stop) if self.stop else None
        return {name: value for name, value in given.items() if value is not None}
