"""What an answer is held to: the schema and the tools of its request, as one grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mmchat.engine.schema import check_size, moved
from mmchat.errors import MissingExtra, SchemaError, quoted
from mmchat.server.errors import ApiError, api_error, invalid
from mmchat.server.fields import Body, Bool, read
from mmchat.server.tool_calls import CallStream

if TYPE_CHECKING:
    from mmchat.engine.grammar import Grammar
    from mmchat.loading.loader import LoadedModel

Mode = Literal["none", "auto", "required"]
# Where the engine finds a fault in a schema that was made of several here
_PART = re.compile(r"schema: anyOf\[(\d+)\](?:\.properties\.parameters)?(?=[.:])")


@dataclass(frozen=True)
class Schema:
    """What a text must be. param: the field that says so.

    is_lenient: what of it cannot be enforced is left out with a notice, not refused.
    """

    param: str
    value: Mapping[str, Any]
    is_lenient: bool = False


@dataclass(frozen=True)
class Plan:
    """declared: what the prompt shows. calls: of tools that may be called, by their names, each
    with the schema of a call. places: the fields of their parameters.

    is_required: the answer must be one of calls, not text. is_strict: refuse what of the schemas
    cannot be enforced. parallel: several calls in one answer.
    """

    declared: tuple[dict[str, Any], ...] = ()
    calls: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    is_required: bool = False
    is_strict: bool = False
    parallel: bool = True

    def stream(self) -> CallStream:
        """What tells the calls from the text of an answer."""
        return CallStream(self.calls, parallel=self.parallel, anywhere=not self.is_strict)


NO_TOOLS = Plan()


def grammar_of(
    model: LoadedModel, schema: Schema | None, plan: Plan, owner: str = ""
) -> Grammar | None:
    """None if the answer is free. Where a call must come, there is no text to obey the schema.

    May take seconds, as the first one of a model does. Raises ApiError that names the field.
    """
    calls, places = [*plan.calls.values()], plan.places
    lenient, or_text = not plan.is_strict, False
    if schema is not None and not plan.is_required:
        value, param, lenient = schema.value, schema.param, lenient and schema.is_lenient
        if calls:  # one of them, or text by the schema
            _check_size(value, param)
            value = {"anyOf": [*calls, moved(value, ("anyOf", len(calls)))]}
            param, places = "tools", (*places, param)
    elif plan.is_required or plan.is_strict:
        value, param, or_text = {"anyOf": calls}, "tools", not plan.is_required
    else:
        return None
    try:
        return model.grammars.compile(value, owner=owner, lenient=lenient, or_text=or_text)
    except MissingExtra as error:
        raise ApiError("unsupported_parameter", str(error), param) from None
    except SchemaError as error:
        text = str(error)
        found = _PART.match(text) if places else None
        param = places[int(found[1])] if found else param
        rest = text[found.end() :] if found else text.removeprefix("schema")
        raise ApiError("invalid_schema", param + rest, param) from None


class _Function(Body):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: Bool = False

    @property
    def declaration(self) -> dict[str, Any]:
        """As a prompt shows it."""
        described = {} if self.description is None else {"description": self.description}
        declared = {"name": self.name, **described, "parameters": self.parameters}
        return {"type": "function", "function": declared}


def plan_of(
    tools: Sequence[Mapping[str, Any]],
    choice: Any = None,
    parallel: bool = True,
    flat: bool = False,
) -> Plan:
    """From the fields tools, tool_choice and parallel_tool_calls; those of Responses too.

    A call that must come is held to the schemas by a grammar, so it comes whatever the model would
    rather say. So is one that may come, if a tool of it is strict; then only that tool's parameters
    are bound. flat: a tool is expected without `function` around it. Raises ApiError.
    """
    found = dict(_tool(tool, f"tools.{index}", flat) for index, tool in enumerate(tools))
    names = [tool.name for tool in found.values()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise invalid("tools", f"two tools are called {quoted(min(twice))}")
    mode, chosen = _choice(choice)
    if mode == "none":
        return NO_TOOLS
    missing = [name for name in chosen or () if name not in names]
    if missing or (mode == "required" and not found):
        what = quoted(missing[0]) if missing else "any tool"
        raise invalid("tool_choice", f"tool_choice asks for {what}, which tools do not hold")
    usable = {at: tool for at, tool in found.items() if chosen is None or tool.name in chosen}
    must, free = mode == "required", {"type": "object"}
    bound = {one.name: one.parameters if must or one.strict else free for one in usable.values()}
    _check_size([*bound.values()], "tools")
    return Plan(
        declared=tuple(tool.declaration for tool in usable.values()),
        calls={name: _call(name, one, at) for at, (name, one) in enumerate(bound.items())},
        places=tuple(f"{at}.parameters" for at in usable),
        is_required=must,
        is_strict=any(tool.strict for tool in usable.values()),
        parallel=parallel,
    )


def _tool(given: Mapping[str, Any], param: str, flat: bool) -> tuple[str, _Function]:
    """The field of it, and what it says. Each API's form is taken by all."""
    if (kind := given.get("type")) != "function":
        raise invalid(param, f"{param} is {quoted(kind)}; only tools of type function are possible")
    if given.get("function") is None and (flat or "name" in given):
        return param, read(_Function, given, param)
    param = f"{param}.function"
    if not isinstance(inner := given.get("function"), Mapping):
        raise invalid(
            param, f"{param}: {'input should be an object' if inner else 'field required'}"
        )
    return param, read(_Function, inner, param)


def _choice(choice: Any) -> tuple[Mode, list[str] | None]:
    """The mode, and the names of tools that may be called; None: all."""
    match choice:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return choice, None
        case {"type": "function", "function": {"name": str(name)}}:
            return "required", [name]
        case {"type": "function", "name": str(name)}:
            return "required", [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*tools]}}:
            return _allowed(mode, tools)
        case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
            return _allowed(mode, tools)
    known = "none, auto, required, or an object that names a function or allowed_tools"
    raise invalid("tool_choice", f"tool_choice is {known}")


def _allowed(mode: Any, tools: Sequence[Any]) -> tuple[Mode, list[str]]:
    names = [name for tool in tools for name in _choice(tool)[1] or ()]
    if mode not in ("auto", "required") or len(names) != len(tools) or not names:
        text = "allowed_tools needs a mode, auto or required, and tools that name functions"
        raise invalid("tool_choice", text)
    return mode, names


def _check_size(schemas: Any, param: str) -> None:
    """Before anything walks them."""
    try:
        check_size(schemas, param)
    except SchemaError as error:
        raise api_error(error, param) from None


def _call(name: str, parameters: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The schema of a call of a tool, as one of the schemas of an anyOf."""
    return {
        "type": "object",
        "properties": {
            "name": {"const": name},
            "parameters": moved(parameters, ("anyOf", index, "properties", "parameters")),
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
