"""Read what the pickle of a checkpoint describes, without unpickling it.

The pickle is walked opcode by opcode. A few opcodes and a few names are known, everything else is
refused, and nothing in it is ever called. The same object may stand in many places, so what is
built stays flat (a tuple holds tuples of numbers at most), and only text is ever made into text:
to write out, hash or compare a pair of twice the pair before would take for ever.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmchat import limits
from mmchat.checkpoints.mapped_file import shown

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_ORDERED_DICT = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ALLOWED = {_ORDERED_DICT, _TENSOR, _PARAMETER, *(("torch", name) for name in _STORAGES)}

_OPCODES = 100 * limits.TENSORS_PER_FILE  # and so the most objects
_TUPLE_ITEMS = 16  # a tensor's parts are 6, its axes 4 at most
_MARK = object()


@dataclass(frozen=True)
class Storage:
    """The data of one or more tensors: member `data/<key>` of the zip, `numel` elements."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class StridedTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: tuple[str, str]


def scan(data: bytes) -> dict[str, StridedTensor]:
    """The tensors by name. Raises ValueError with the reason when there is anything else."""
    try:
        value = _walk(data)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is damaged ({shown(error)})") from None
    if not isinstance(value, dict) or not value:
        raise ValueError("it is not a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(tensor, StridedTensor):
            raise ValueError(f"entry {shown(name)} is not a tensor")
    if len(value) > limits.TENSORS_PER_FILE:
        raise ValueError(f"it has more than {limits.TENSORS_PER_FILE:,} tensors")
    return value


def _walk(data: bytes) -> Any:
    """What the pickle describes: dict, tuple, str, int, bool, None and the classes above."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for name, argument in _opcodes(data):
        if name == "STOP":
            if len(stack) != 1:
                raise ValueError("something is left on its stack")
            return stack[0]
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _PUSHED:
            stack.append(_PUSHED[name](argument))
        elif name in _APPLIED:
            _APPLIED[name](stack, argument)
    raise ValueError("it has no end")


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each opcode; an argument is decoded only after its opcode is known."""
    stream = io.BytesIO(data)
    for _ in range(_OPCODES):
        position, code = stream.tell(), stream.read(1).decode("latin-1")
        opcode = _BY_CODE.get(code)
        if opcode is None:
            raise ValueError(f"{code!r} at {position} is no opcode")
        if opcode.name not in _KNOWN:
            raise ValueError(f"opcode {opcode.name} at {position} has no place in a checkpoint")
        if opcode.name == "STOP" and position != len(data) - 1:
            raise ValueError("something follows its end")
        if opcode.name == "GLOBAL":
            yield "GLOBAL", [stream.readline()[:-1].decode() for _ in range(2)]
        else:
            yield opcode.name, opcode.arg.reader(stream) if opcode.arg else None
    raise ValueError("it is too long")


def _since_mark(stack: list[Any]) -> list[Any]:
    index = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), -1)
    if index < 0:
        raise ValueError("a MARK is missing")
    items = stack[index + 1 :]
    del stack[index:]
    return items


def _global(module: str, name: str) -> _Global:
    if (module, name) not in _ALLOWED:
        raise ValueError(
            f"it names {shown(f'{module}.{name}')}, which no checkpoint needs and may run code"
        )
    return _Global((module, name))


def _stack_global(stack: list[Any], _: Any) -> None:
    name, module = stack.pop(), stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a name in it is not a string")
    stack.append(_global(module, name))


def _tuple_of(length: int) -> Any:
    """TUPLE1 to TUPLE3."""
    return lambda stack, _: stack.append(_flat_tuple([stack.pop() for _ in range(length)][::-1]))


def _flat_tuple(items: list[Any]) -> tuple[Any, ...]:
    if len(items) > _TUPLE_ITEMS:
        raise ValueError(f"it has a tuple of {len(items):,} items")
    nested = (inner for item in items if isinstance(item, tuple) for inner in item)
    if any(isinstance(inner, tuple | dict) for inner in nested):
        raise ValueError("its tuples are nested deeper than those of a tensor")
    return tuple(items)


def _set_items(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("it sets items of something that is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise ValueError(f"a key of it is of type {type(key).__name__}, not a string")
        if key in target:
            raise ValueError(f"key {shown(key)} occurs twice")
        target[key] = value


def _set_item(stack: list[Any], _: Any) -> None:
    value, key = stack.pop(), stack.pop()
    _set_items(stack, [key, value])


def _build(stack: list[Any], _: Any) -> None:
    """Attributes of an object: only `_metadata` of a state dict, which is not needed."""
    state = stack.pop()
    if not isinstance(stack[-1], dict) or not isinstance(state, dict) or set(state) - {"_metadata"}:
        raise ValueError("it sets attributes of an object")


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def _storage(stack: list[Any], _: Any) -> None:
    match stack.pop():
        case ("storage", _Global(name=("torch", str(kind))), str(key), str(), int(numel)) if (
            kind in _STORAGES and _are_counts(numel)
        ):
            stack.append(Storage(_STORAGES[kind], key, numel))
        case _:
            raise ValueError("a tensor has no plain storage")


def _reduce(stack: list[Any], _: Any) -> None:
    arguments, function = stack.pop(), stack.pop()
    match function, arguments:
        case _Global(name=name), () if name == _ORDERED_DICT:
            stack.append({})
        case (
            _Global(name=name),
            (Storage() as storage, offset, tuple(shape), tuple(stride), bool(), {}),
        ) if name == _TENSOR and len(shape) == len(stride):
            if not _are_counts(offset, *shape, *stride):
                raise ValueError("a size, stride or offset is no whole number")
            stack.append(StridedTensor(storage, offset, shape, stride))
        case _Global(name=name), (StridedTensor() as tensor, bool(), {}) if name == _PARAMETER:
            stack.append(tensor)
        case _:
            raise ValueError("it calls something else than the makers of plain tensors")


_PUSHED = {
    "MARK": lambda _: _MARK,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "GLOBAL": lambda arg: _global(*arg),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), int),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), str),
}
_APPLIED = {
    "STACK_GLOBAL": _stack_global,
    "TUPLE": lambda stack, _: stack.append(_flat_tuple(_since_mark(stack))),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "SETITEM": _set_item,
    "SETITEMS": lambda stack, _: _set_items(stack, _since_mark(stack)),
    "BUILD": _build,
    "BINPERSID": _storage,
    "REDUCE": _reduce,
}
_KNOWN = {
    "PROTO", "FRAME", "STOP", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
    *_PUSHED, *_APPLIED,
}  # fmt: skip
_BY_CODE = {opcode.code: opcode for opcode in pickletools.opcodes}
