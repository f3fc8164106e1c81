"""What a request asks for by its tools: what is shown to the model, and what it is held to.

How an API uses it, from request to answer:

    plan = plan_of(body.tools, body.tool_choice, body.parallel_tool_calls)   # ToolError: 400
    prompt = model.processor.chat(messages, tools=plan.declared)             # off the loop
    grammar = grammar_of(model, schema, plan)                                # ApiError: 400
    request = replace(made, grammar=grammar)                                 # made: a Request
    calls = CallStream(plan.names, parallel=plan.parallel, anywhere=not plan.is_strict)
    for delta in answering:
        for piece in calls.feed(delta.text): …       # Content, CallBegin, CallArguments
        if calls.is_done: close the answering        # the rest is not wanted
    for piece in calls.end(): …
    finish_reason = calls.finish_reason(finished.reason)

Without tools `plan.names` is empty and everything is content. Earlier calls go into
`Message("assistant", text, calls=(ToolCall(name, arguments), …))`, their results into
`Message("tool", text)`. `calls.calls` has whole calls for APIs that send them so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmchat.engine.schema import check_size, moved
from mmchat.errors import UsageError, quoted

MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class ToolError(UsageError):
    """Tools or a choice of them that mean nothing. param: the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Plan:
    """declared: what the prompt shows. names: of tools that may be called.

    calls: the schema of a call of each, and places: the fields of their parameters. is_held: the
    answer must be one of calls; or_text: or text. is_strict: refuse what cannot be enforced.
    parallel: several calls in one answer.
    """

    declared: tuple[dict[str, Any], ...] = ()
    names: frozenset[str] = frozenset()
    calls: tuple[dict[str, Any], ...] = ()
    places: tuple[str, ...] = ()
    is_held: bool = False
    or_text: bool = False
    is_strict: bool = False
    parallel: bool = True


NO_TOOLS = Plan()


@dataclass(frozen=True)
class _Tool:
    name: str
    parameters: Mapping[str, Any]
    param: str
    strict: bool
    declaration: dict[str, Any]


def plan_of(tools: Sequence[Any] | None, choice: Any = None, parallel: bool | None = None) -> Plan:
    """From the fields tools, tool_choice and parallel_tool_calls; those of Responses too.

    A call that must come is held to the schemas by a grammar, so it comes whatever the model would
    rather say. So is one that may come, if a tool of it is strict; then only that tool's parameters
    are bound. Raises ToolError, and SchemaError if these are too large together.
    """
    if len(tools or []) > MOST_TOOLS:
        raise ToolError(f"there are more than {MOST_TOOLS} tools", "tools")
    found = [_tool(tool, f"tools.{index}") for index, tool in enumerate(tools or [])]
    names = [tool.name for tool in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ToolError(f"two tools are called {quoted(min(twice))}", "tools")
    mode, chosen = _choice(choice)
    if mode != "none":
        missing = [name for name in chosen or () if name not in names]
        if missing or (mode == "required" and not found):
            what = quoted(missing[0]) if missing else "any tool"
            raise ToolError(f"tool_choice asks for {what}, which tools do not hold", "tool_choice")
    if mode == "none" or not found:
        return NO_TOOLS
    usable = [tool for tool in found if chosen is None or tool.name in chosen]
    is_strict = any(tool.strict for tool in usable)
    must = mode == "required"
    free = {"type": "object"}
    bound = [t if must or t.strict else replace(t, parameters=free) for t in usable]
    check_size([tool.parameters for tool in bound], "tools")
    return Plan(
        declared=tuple(tool.declaration for tool in usable),
        names=frozenset(tool.name for tool in usable),
        calls=_calls(bound),
        places=tuple(tool.param for tool in usable),
        is_held=must or is_strict,
        or_text=not must,
        is_strict=is_strict,
        parallel=parallel is not False,
    )


def _tool(given: Any, param: str) -> _Tool:
    if not isinstance(given, Mapping) or given.get("type") != "function":
        kind = quoted(given.get("type")) if isinstance(given, Mapping) else "no object"
        raise ToolError(f"{param} is {kind}; only tools of type function are possible", param)
    inner = given.get("function")
    function = inner if isinstance(inner, Mapping) else given  # Responses has the fields beside
    param = f"{param}.function" if function is inner else param
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolError(
            f"{param}.name must be 1 to 64 letters, digits, _, . or -, not {quoted(name)}",
            f"{param}.name",
        )
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise ToolError(f"{param}.parameters must be a JSON schema", f"{param}.parameters")
    declared: dict[str, Any] = {"name": name}
    if (description := function.get("description")) is not None:
        if not isinstance(description, str):
            raise ToolError(f"{param}.description must be text", f"{param}.description")
        declared["description"] = description
    declaration = {"type": "function", "function": {**declared, "parameters": parameters}}
    is_strict = function.get("strict") is True
    return _Tool(name, parameters, f"{param}.parameters", is_strict, declaration)


def _choice(choice: Any) -> tuple[Literal["none", "auto", "required"], list[str] | None]:
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
    raise ToolError(
        "tool_choice is none, auto, required, or an object that names a function or allowed_tools",
        "tool_choice",
    )


def _allowed(
    mode: Any, tools: Sequence[Any]
) -> tuple[Literal["none", "auto", "required"], list[str]]:
    names = [name for tool in tools for name in _choice(tool)[1] or ()]
    if mode not in ("auto", "required") or len(names) != len(tools) or not names:
        raise ToolError(
            "allowed_tools needs a mode, auto or required, and tools that name functions",
            "tool_choice",
        )
    return mode, names


def _calls(tools: Sequence[_Tool]) -> tuple[dict[str, Any], ...]:
    """The schema of a call of each, as one of the schemas of an anyOf."""
    return tuple(
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "parameters": moved(tool.parameters, ("anyOf", index, "properties", "parameters")),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    )
