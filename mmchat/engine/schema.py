"""JSON schemas that answers are held to: read, bounded, and walked place by place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.errors import SchemaError, quoted
from mmchat.strict_json import Where, as_object, parse_json, read_bounded

# Where schemas stand within a schema: alone, in a list, by name.
_ALONE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTED = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")

_COMPACT = ",", ":"
Keys = tuple[str | int, ...]


def as_text(given: object, name: str = "schema") -> str:
    """A schema as JSON text, in the order of its keys.

    given: a dictionary, a class that gives one by `model_json_schema` (as of pydantic), or JSON
    text. Raises SchemaError for another thing, what is over the limits of size and depth, and JSON
    that is not strict.
    """
    where = Where(name, error=SchemaError)
    describe = getattr(given, "model_json_schema", None)
    if callable(describe):
        given = describe()
    if isinstance(given, Mapping):
        try:
            given = json.dumps(given, ensure_ascii=False, allow_nan=False, separators=_COMPACT)
        except (TypeError, ValueError, RecursionError) as error:
            raise where.fail(f"cannot be written as JSON: {quoted(str(error))}") from None
    if not isinstance(given, str):
        raise where.fail(f"must be a dictionary or JSON text, not {type(given).__name__}")
    data = _encoded(given, where)
    _check_size(data, where)
    found = as_object(parse_json(data, where), where)
    text = json.dumps(mapped(found, _enforceable), ensure_ascii=False, separators=_COMPACT)
    _encoded(text, where)  # halves of a pair may have been escapes
    return text


def _encoded(text: str, where: Where) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise where.fail(f"holds {half} alone, half of a pair, which is no character") from None


def _enforceable(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing, which the library that enforces schemas does not take, and the key
    from which it takes settings of its own."""
    if schema.get("uniqueItems") is False:
        schema = _without(schema, "uniqueItems")
    return _without(schema, "x-guidance")


def check_size(given: object, name: str) -> None:
    """Raises SchemaError for a schema, or several, over the limit, before anything walks them."""
    text = json.dumps(given, ensure_ascii=False, separators=_COMPACT)
    _check_size(text.encode("utf-8", "replace"), Where(name, error=SchemaError))


def _check_size(data: bytes, where: Where) -> None:
    if len(data) > limits.SCHEMA_BYTES:
        raise where.fail(f"{len(data):,} bytes; at most {limits.SCHEMA_BYTES:,} are possible")


def read(argument: str) -> str:
    """A schema of the command line or the chat: JSON, if it begins with `{`, else a file.

    Raises SchemaError.
    """
    if argument.lstrip().startswith("{"):
        return as_text(argument)
    if not argument.strip():
        raise SchemaError("the schema is empty; give JSON that begins with '{', or a file")
    where = Where(argument, error=SchemaError)
    path = Path(argument).expanduser()
    data = read_bounded(path, limits.SCHEMA_BYTES, where)
    parse_json(data, where)  # faults are told with the name of the file
    return as_text(data.decode("utf-8-sig"), argument)


def mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The same with `change` made to each schema in it; what only looks like one stays."""
    if not isinstance(schema, dict):  # true and false are schemas too
        return schema
    found = dict(schema)
    for keys, at in _inside(schema):
        if len(keys) == 1:
            found[keys[0]] = mapped(at, change)
        else:
            if found[keys[0]] is schema[keys[0]]:
                found[keys[0]] = schema[keys[0]].copy()
            found[keys[0]][keys[1]] = mapped(at, change)
    return change(found)


def places(schema: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Each schema in it and where it stands, those inside before those around them."""
    if isinstance(schema, dict):
        for keys, inside in _inside(schema):
            yield from places(inside, (*path, *keys))
    yield path, schema


def moved(schema: Mapping[str, Any], path: Keys) -> dict[str, Any]:
    """`schema` as it must be to stand at `path` of another: what it says of places in itself."""
    start = pointer(path)

    def change(one: dict[str, Any]) -> dict[str, Any]:
        target = one.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            one = {**one, "$ref": start + target[1:]}
        return one

    # A schema with an address of its own would be the one that `#` means within it.
    return mapped(_without(dict(schema), "$id", "$schema"), change)


def pointer(path: Keys) -> str:
    """`path` as `$ref` writes it."""
    return "#" + "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in path)


def _inside(schema: Mapping[str, Any]) -> Iterator[tuple[Keys, Any]]:
    """The schemas right within one, each with its keys from there."""
    for key in _ALONE:
        if isinstance(schema.get(key), dict):
            yield (key,), schema[key]
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            yield from (((key, index), one) for index, one in enumerate(schema[key]))
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            yield from (((key, name), one) for name, one in schema[key].items())


def _without(schema: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in keys}
