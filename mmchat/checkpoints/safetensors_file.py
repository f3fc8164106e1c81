"""The header of a safetensors file: 8 bytes of length (little endian), JSON, then the data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from typing import Any

from mmchat import limits
from mmchat.checkpoints.mapped_file import MappedFile, TensorEntry, shown
from mmchat.strict_json import parse_object

DTYPES = {  # torch's name by the name in a header
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip


def read_entries(file: MappedFile) -> list[TensorEntry]:
    """The tensors of `file` in the order of their data.

    Raises CheckpointError unless the tensors fill the file exactly, without holes or overlaps.
    """
    data_start = 8 + _header_length(file)
    try:
        header = parse_object(file.read_at(8, data_start - 8))
    except ValueError as error:
        raise file.error(f"the safetensors header is damaged: {error}; download it again") from None
    if not isinstance(header.pop("__metadata__", {}), dict | None):
        raise file.error("the safetensors header is damaged: __metadata__ is not an object")
    if not 1 <= len(header) <= limits.TENSORS_PER_FILE:
        raise file.error(f"{len(header):,} tensors, from 1 to {limits.TENSORS_PER_FILE:,} are read")
    entries = file.in_order(_entry(file, name, item, data_start) for name, item in header.items())
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise file.error(f"tensor {shown(entry.name)}: its data leaves a hole before it")
        position = entry.end
    if position < file.size:
        extra = file.size - position
        raise file.error(f"has {extra:,} bytes after the last tensor; download it again")
    return entries


def _header_length(file: MappedFile) -> int:
    head = file.read_at(0, min(file.size, 9))
    if head.startswith(b"PK\x03\x04"):
        raise file.error("is a zip archive, not safetensors; does it want the ending .pth?")
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= limits.SAFETENSORS_HEADER_BYTES or head[8:] not in (b"{", b""):
        raise file.error(
            "is no safetensors file: it does not begin with the length of a JSON object, at most"
            f" {limits.SAFETENSORS_HEADER_BYTES:,} bytes; download it again"
        )
    return length


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _entry(file: MappedFile, name: str, item: Any, data_start: int) -> TensorEntry:
    match item:
        case {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]} if len(
            item
        ) == 3 and all(map(_is_count, (*shape, begin, end))):
            entry = TensorEntry(
                name, DTYPES.get(str(dtype), ""), tuple(shape), file.path, data_start + begin
            )
        case _:
            raise file.error(
                f"tensor {shown(name)}: needs dtype, shape and a pair of data_offsets, in whole"
                " numbers, and nothing else"
            )
    if not entry.dtype:
        raise file.error(f"tensor {shown(name)}: dtype {shown(dtype)} is not supported")
    file.check_tensor(name, entry.shape)
    if end - begin != entry.num_bytes:
        raise file.error(
            f"tensor {shown(name)}: {list(entry.shape)} {entry.dtype} needs {entry.num_bytes:,}"
            f" bytes, data_offsets give {end - begin:,}"
        )
    return entry
