"""What is wrong with the value of an option, in words: the value, and what it should have been."""

from __future__ import annotations

from typing import Any, get_args

import typer

from mmchat.errors import quoted


def explained(error: typer.BadParameter) -> str:
    """The message of a usage error, with the validator's own English replaced where it has any."""
    cause: Any = error.__cause__
    if error.param is None or not hasattr(cause, "errors"):
        return error.format_message()
    fault = cause.errors()[0]
    noun = wanted(error.param)
    message = f"{quoted(fault['input'])} is not {noun}" if noun else fault["msg"]
    hint = " / ".join(map(repr, error.param.opts)) or repr(error.param.name)
    return f"Invalid value for {hint}: {message.removeprefix('Value error, ')}"


def wanted(parameter: Any) -> str:
    """`a whole number from 1 to 20` for an option that takes one; empty if it takes no number."""
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is None:
        return ""
    kinds = (descriptor.annotation, *get_args(descriptor.annotation))
    kind = next((kind for kind in kinds if kind in (int, float)), None)
    if kind is None:
        return ""
    info = descriptor.parameter_info
    if allowed := getattr(info.callback, "allowed", None):
        return allowed
    return numbers("a whole number" if kind is int else "a number", info.min, info.max)


def numbers(noun: str, low: float | None, high: float | None) -> str:
    """`a number from 0 to 1`, `a whole number of 1 or more`."""
    if low is None:
        return noun
    if high is None:
        return f"{noun} of {low:g} or more"
    return f"{noun} from {low:g} to {high:g}"
