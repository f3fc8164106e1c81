"""The header of a safetensors file: 8 bytes of length (little endian), JSON, then the data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import struct
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
    length = _header_length(file)
    try:
        header = parse_object(file.read_at(8, length))
    except ValueError as error:
        raise file.error(f"the safetensors header is damaged: {error}; download it again") from None
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise file.error("the safetensors header is damaged: __metadata__ is not an object")
    if not header:
        raise file.error("holds no tensors")
    if len(header) > limits.TENSORS_PER_FILE:
        raise file.error(f"{len(header):,} tensors, at most {limits.TENSORS_PER_FILE:,} are read")
    spans = sorted(
        (_span(file, name, item) for name, item in header.items()), key=lambda span: span[0]
    )
    return _placed(file, spans, data_start=8 + length)


def _header_length(file: MappedFile) -> int:
    if file.size < 8:
        raise file.error(
            f"has only {file.size} bytes and is no safetensors file; download it again"
        )
    head = file.read_at(0, min(file.size, 9))
    if head.startswith(b"PK\x03\x04"):
        raise file.error("is a zip archive, not safetensors; does it want the ending .pth?")
    length: int = struct.unpack("<Q", head[:8])[0]
    if length > limits.SAFETENSORS_HEADER_BYTES or length < 2:
        raise file.error(
            f"is no safetensors file: its header would have {length:,} bytes"
            f" (at most {limits.SAFETENSORS_HEADER_BYTES:,})"
        )
    if 8 + length > file.size:
        raise file.error(
            f"is cut off inside its header: {file.size:,} bytes of at least {8 + length:,};"
            " download it again"
        )
    if head[8:9] != b"{":
        raise file.error("is no safetensors file: its header is not a JSON object")
    return length


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _span(file: MappedFile, name: str, item: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of one header item, checked."""
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise file.error(f"tensor {shown(name)}: needs dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise file.error(f"tensor {shown(name)}: dtype {shown(dtype)} is not supported")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise file.error(f"tensor {shown(name)}: its shape is not a list of whole numbers")
    file.check_tensor(name, tuple(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise file.error(f"tensor {shown(name)}: data_offsets is not a pair of whole numbers")
    begin, end = offsets
    entry = TensorEntry(name, DTYPES[dtype], tuple(shape), file.path)
    if end - begin != entry.num_bytes:
        raise file.error(
            f"tensor {shown(name)}: {list(entry.shape)} {entry.dtype} needs {entry.num_bytes:,}"
            f" bytes, data_offsets give {end - begin:,}"
        )
    return begin, end, name, entry.dtype, entry.shape


def _placed(
    file: MappedFile, spans: list[tuple[int, int, str, str, tuple[int, ...]]], data_start: int
) -> list[TensorEntry]:
    entries, position = [], 0
    for begin, end, name, dtype, shape in spans:
        if begin != position:
            kind = (
                "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            )
            raise file.error(f"tensor {shown(name)}: its data {kind}")
        entries.append(TensorEntry(name, dtype, shape, file.path, data_start + begin))
        position = end
    if data_start + position > file.size:
        first = next(e for e in entries if e.offset + e.num_bytes > file.size)
        raise file.error(
            f"is cut off in tensor {shown(first.name)}: {file.size:,} bytes of"
            f" {data_start + position:,}; download it again"
        )
    if data_start + position < file.size:
        extra = file.size - data_start - position
        raise file.error(f"has {extra:,} bytes after the last tensor; download it again")
    return entries
