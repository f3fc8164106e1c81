"""What an answer is held to: the schema and the tools of its request, as one grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmchat.engine.schema import moved
from mmchat.errors import MissingExtra, SchemaError
from mmchat.server.errors import ApiError
from mmchat.server.tools import Plan

if TYPE_CHECKING:
    from mmchat.engine.grammar import Grammar
    from mmchat.loading.loader import LoadedModel

# Where the engine finds a fault in a schema that was made of several here
_PART = re.compile(r"schema: anyOf\[(\d+)\](?:\.properties\.parameters)?(?=[.:])")

_NOTICE_CHARACTERS = 1_000


@dataclass(frozen=True)
class Schema:
    """What a text must be. param: the field that says so.

    is_lenient: what of it cannot be enforced is left out with a notice, not refused.
    """

    param: str
    value: Mapping[str, Any]
    is_lenient: bool = False


def grammar_of(model: LoadedModel, schema: Schema | None, plan: Plan) -> Grammar | None:
    """None if the answer is free. Where a call must come, there is no text to obey the schema.

    May take seconds, as the first one of a model does. Raises ApiError that names the field.
    """
    lenient = not plan.is_strict
    if schema is not None and not plan.names:
        return _compiled(model, schema.value, schema.param, lenient=schema.is_lenient)
    if schema is not None and plan.or_text:
        text = moved(schema.value, ("anyOf", len(plan.calls)))
        either = {"anyOf": [*plan.calls, text]}
        places = (*plan.places, schema.param)
        lenient = lenient and schema.is_lenient
        return _compiled(model, either, "tools", places, lenient=lenient)
    if not plan.is_held:
        return None
    calls = {"anyOf": plan.calls}
    return _compiled(model, calls, "tools", plan.places, lenient=lenient, or_text=plan.or_text)


def _compiled(
    model: LoadedModel,
    schema: Mapping[str, Any],
    param: str,
    places: Sequence[str] = (),
    **options: bool,
) -> Grammar:
    """param: the field of the schema. places: the fields of those that it is made of."""
    try:
        return model.grammars.compile(schema, **options)
    except MissingExtra as error:
        raise ApiError("unsupported_parameter", str(error), param) from None
    except SchemaError as error:
        text = str(error)
        found = _PART.match(text) if places else None
        param = places[int(found[1])] if found else param
        rest = text[found.end() :] if found else text.removeprefix("schema")
        raise ApiError("invalid_schema", param + rest, param) from None


def notice_header(notices: Sequence[str]) -> dict[str, str]:
    """What is done otherwise than asked; schemas may say what no header can."""
    text = "; ".join(notices).encode("ascii", "backslashreplace").decode()
    text = "".join(char if char.isprintable() else " " for char in text)
    return {"x-mmchat-notice": text[:_NOTICE_CHARACTERS]} if text else {}
