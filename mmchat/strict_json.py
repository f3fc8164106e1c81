"""JSON from outside, read strictly, and turned into frozen dataclasses with type and range checks.

Python's own parser takes the last of two equal keys, NaN, infinities and `1e999`, and ends in
RecursionError on deep nesting. Here each of these is an error that names the file and the key.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmchat import limits
from mmchat.errors import MmchatError, ParamsError, quoted
from mmchat.spelling import closest

MAX_DEPTH = 32
_INTEGERS = range(-(2**63), 2**63)

T = TypeVar("T")
Bounds = Mapping[type, Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Where:
    """A place in a file, for messages, and the class of error that faults there raise."""

    file: str
    path: str = ""
    error: type[MmchatError] = ParamsError

    def child(self, key: str | int) -> Where:
        """The place of `key` (or list index) inside this one."""
        if isinstance(key, int):
            return replace(self, path=f"{self.path}[{key}]")
        shown = key if re.fullmatch(r"[\w-]{1,64}", key, re.ASCII) else quoted(key)
        return replace(self, path=f"{self.path}.{shown}" if self.path else shown)

    def fail(self, message: str) -> MmchatError:
        """The error to raise: file, key path and message in one line."""
        return self.error(": ".join(filter(None, (escaped(self.file), self.path, message))))


def escaped(text: str) -> str:
    """`text` as it is if it is printable, else its `repr`."""
    return text if text.isprintable() else repr(text)


def nearest(name: str, valid: Sequence[str]) -> str:
    """' (nearest: …)' with the valid name closest to `name`, or nothing if none is close."""
    found = closest(name, valid, cutoff=0.55)
    return f" (nearest: {quoted(found[0])})" if found else ""


def read_bounded(path: Path, limit: int, where: Where) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises where's error if it is missing, unreadable, not a regular file, empty, too big, or a web
    page or Git LFS pointer in place of the file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise where.fail("not a regular file")
        if status.st_size > limit:
            raise where.fail(f"{status.st_size:,} bytes; such a file has at most {limit:,}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise where.fail("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise where.fail(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > limit:
        raise where.fail(f"more than {limit:,} bytes")
    if not data:
        raise where.fail("the file is empty")
    if foreign := foreign_content(data[:512]):
        raise where.fail(foreign)
    return data


def foreign_content(head: bytes) -> str | None:
    """What a file that begins with `head` is, when a failed download left it in another's place."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file itself; the download failed, fetch it again"
    return None


def read_json(path: Path, where: Where | None = None, limit: int = limits.CONFIG_JSON_BYTES) -> Any:
    """Read one JSON file strictly. `where` defaults to the file name with ParamsError."""
    where = where or Where(str(path))
    return parse_json(read_bounded(path, limit, where), where)


def parse_json(data: bytes, where: Where) -> Any:
    """Parse UTF-8 JSON strictly; faults are where's error."""
    try:
        return loads(data)
    except ValueError as error:
        raise where.fail(str(error)) from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON strictly to an object; ValueError says in one line what is wrong."""
    found = loads(data)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {_kind(found)}")
    return found


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON: no duplicate keys, no non-finite numbers, at most MAX_DEPTH levels.

    Raises ValueError with one line that says what is wrong.
    """
    try:
        text = bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    _check_depth(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_real,
        )
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"not valid JSON: {what} at {place}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {quoted(key)} appears twice in one object")
    return found


def _integer(digits: str) -> int:
    # a limit on the digits first: to read very many of them takes long
    if len(digits) > 20 or (number := int(digits)) not in _INTEGERS:
        raise ValueError(f"integer {quoted(digits)} does not fit into 64 bits")
    return number


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"number {quoted(digits)} is not finite")
    return number


def _check_depth(text: str) -> None:
    depth = 0
    # A string that never ends counts to the end of the text, so that one scan is enough.
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', text, re.DOTALL):
        char = token.group()[0]
        if char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        elif char != '"':
            depth -= 1


def as_object(value: Any, where: Where) -> dict[str, Any]:
    """`value` as a JSON object, or where's error."""
    if not isinstance(value, dict):
        raise where.fail(f"expected an object, found {_kind(value)}")
    return value


def check_divides(config: object, divisor: str, dividend: str, where: Where) -> None:
    """Raises the error of `where` unless the field `divisor` divides the field `dividend`."""
    small, large = getattr(config, divisor), getattr(config, dividend)
    if large % small:
        raise where.child(divisor).fail(f"{small:,} does not divide {dividend} = {large:,}")


def check_keys(
    found: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], where: Where
) -> None:
    """Raise where's error for the first unknown key, else for all missing ones."""
    valid = [*required, *optional]
    for key in found:
        if key not in valid:
            raise where.fail(f"unknown key {quoted(key)}{nearest(key, valid)}")
    if missing := [key for key in required if key not in found]:
        names = ", ".join(map(quoted, missing))
        raise where.fail(f"missing key{'s' * (len(missing) > 1)} {names}")


def parse_dataclass(cls: type[T], value: Any, where: Where, bounds: Bounds) -> T:
    """Make a dataclass from a JSON object.

    Fields may be int, float, bool, str, Literal, `X | None`, dict, tuples of these and dataclasses.
    `4.0` and `true` are no integers. Keys without a default must be there, unknown ones must not.
    bounds: per class, field name -> (least, most), for the number or each number of a tuple.
    """
    found = as_object(value, where)
    hints = _type_hints(cls)
    members = fields(cls)  # type: ignore[arg-type]
    required = [f.name for f in members if f.default is MISSING and f.default_factory is MISSING]
    check_keys(found, required, [f.name for f in members if f.name not in required], where)
    limits_of = bounds.get(cls, {})
    values = {
        key: _convert(hints[key], item, where.child(key), limits_of.get(key), bounds)
        for key, item in found.items()
    }
    return cls(**values)


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _convert(
    hint: Any, value: Any, where: Where, range_: tuple[float, float] | None, bounds: Bounds
) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (hint,) = (a for a in arguments if a is not NoneType)
        return _convert(hint, value, where, range_, bounds)
    if origin is Literal:
        if value not in arguments or not isinstance(value, str):
            valid = ", ".join(map(quoted, arguments))
            raise where.fail(f"expected one of {valid}, found {_kind(value)}")
        return value
    if origin is dict:
        return as_object(value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where, range_, bounds)
    if isinstance(hint, type) and is_dataclass(hint):
        return parse_dataclass(hint, value, where, bounds)
    return _scalar(hint, value, where, range_)


def _convert_tuple(
    hints: tuple[Any, ...],
    value: Any,
    where: Where,
    range_: tuple[float, float] | None,
    bounds: Bounds,
) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise where.fail(f"expected a list, found {_kind(value)}")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise where.fail(f"expected a list of {len(hints)}, found {len(value)} entries")
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_convert(h, v, where.child(i), range_, bounds) for i, (h, v) in pairs)


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _scalar(hint: type, value: Any, where: Where, range_: tuple[float, float] | None) -> Any:
    accepted = (int, float) if hint is float else (hint,)
    if type(value) not in accepted:
        raise where.fail(f"expected {_NAMES[hint]}, found {_kind(value)}")
    if range_ and not range_[0] <= value <= range_[1]:
        least, most = (f"{bound:,}" for bound in range_)
        raise where.fail(f"{quoted(value)} is out of range; {least} to {most} is possible")
    return hint(value)


def _kind(value: Any) -> str:
    """How a message names a JSON value."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return quoted(value)
