"""The header of a GGUF file: metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.checkpoints.gguf_blocks import OTHERS, PACKED, PLAIN, BlockType
from mmchat.checkpoints.mapped_file import MappedFile, TensorEntry, shown
from mmchat.storage.safe_files import open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where the file says nothing else
_ALIGNMENTS = tuple(2**power for power in range(3, 17))
_STRING, _ARRAY = 8, 9
# struct's letter of each kind of number in metadata
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself. entries: its tensors as they are stored, in the order of their
    data, those of blocks as uint8 [..., bytes of a row]; blocks: the types of these, by name."""

    metadata: Mapping[str, Any]
    entries: list[TensorEntry]
    blocks: Mapping[str, BlockType]


def is_gguf(path: Path) -> bool:
    """Whether a file that can be read is called .gguf, or begins as GGUF."""
    try:
        with open_regular(path.resolve()) as opened:
            return path.suffix == ".gguf" or opened.read(len(MAGIC)) == MAGIC
    except (OSError, RuntimeError, ValueError):
        return False  # a reader says what is wrong


def gguf_at(path: Path) -> list[Path]:
    """`path`, or the .gguf files of a folder; empty where there are none."""
    if path.is_dir():
        return [file for file in sorted(path.glob("*.gguf")) if is_gguf(file)]
    return [path] if is_gguf(path) else []


def read_header(file: MappedFile) -> GgufHeader:
    """Read and check the header; every tensor lies in the file, and none in another's place.

    Raises CheckpointError.
    """
    reader = _Reader(file)
    _check_version(file, reader.take(8))
    tensors, keys = reader.number("Q"), reader.number("Q")
    for count, most, what in (
        (tensors, limits.TENSORS_PER_FILE, "tensors"),
        (keys, limits.GGUF_KEYS, "keys of metadata"),
    ):
        if count > most:
            raise file.error(f"{count:,} {what}, at most {most:,} are read")
    if not tensors:
        raise file.error("holds no tensors")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string(limits.TENSOR_NAME_BYTES)
        if key in metadata:
            raise file.error(f"key {shown(key)} of its metadata is there twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [_info(file, reader) for _ in range(tensors)]
    return _placed(file, metadata, infos, reader.at)


def _check_version(file: MappedFile, head: bytes) -> None:
    if not head.startswith(MAGIC):
        raise file.error("is no GGUF file")
    version = int.from_bytes(head[4:], "little")
    if version in _VERSIONS:
        return
    if int.from_bytes(head[4:], "big") in (1, *_VERSIONS):
        raise file.error("is a GGUF file of a big-endian machine, which mmchat does not read")
    raise file.error(f"is GGUF of version {version}; mmchat reads versions 2 and 3")


class _Reader:
    """Takes a header's parts one by one; CheckpointError where the file or the bound ends."""

    def __init__(self, file: MappedFile) -> None:
        self._file, self.at = file, 0
        self._data = file.read_at(0, min(file.size, limits.GGUF_HEADER_BYTES))

    def _advance(self, size: int) -> int:
        """Where `size` bytes begin that are there, and now are taken."""
        begin, self.at = self.at, self.at + size
        if self.at <= len(self._data):
            return begin
        if len(self._data) < self._file.size:
            raise self._file.error(
                f"its GGUF header is longer than {limits.GGUF_HEADER_BYTES:,} bytes"
            )
        raise self._file.error(
            f"is cut off inside its GGUF header, at {self._file.size:,} bytes; get it again"
        )

    def take(self, size: int) -> bytes:
        begin = self._advance(size)
        return self._data[begin : self.at]

    def number(self, kind: str) -> int:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        form = f"<{count}{kind}"
        return struct.unpack_from(form, self._data, self._advance(struct.calcsize(form)))

    def string(self, most: int = limits.GGUF_STRING_BYTES) -> str:
        size = self.number("Q")
        if size > most:
            raise self._file.error(f"a text of {size:,} bytes in its header, at most {most:,}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise self._file.error("a text in its GGUF header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self._of_kind(kind, 1)[0]
        kind, count = self.number("I"), self.number("Q")
        if count > limits.GGUF_ARRAY:
            raise self._file.error(
                f"a list of {count:,} in its header, at most {limits.GGUF_ARRAY:,} are read"
            )
        return self._strings(count) if kind == _STRING else self._of_kind(kind, count)

    def _strings(self, count: int) -> list[str]:
        """As `string` does it, for the hundreds of thousands that a tokenizer has."""
        data, at, found, size_at = self._data, self.at, [], struct.Struct("<Q").unpack_from
        last = len(data) - 8
        for _ in range(count):
            end = at + 8 + size_at(data, at)[0] if at <= last else at
            if not at < end <= len(data):
                self.at = at
                self.string()  # says what is wrong
            found.append(data[at + 8 : end])
            at = end
        self.at = at
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError:
            raise self._file.error("a text in its GGUF header is not UTF-8") from None

    def _of_kind(self, kind: int, count: int) -> tuple[Any, ...]:
        if kind not in _NUMBERS:
            raise self._file.error(f"a value of the unknown kind {kind} in its GGUF header")
        return self.numbers(_NUMBERS[kind], count)


def _info(file: MappedFile, reader: _Reader) -> tuple[TensorEntry, BlockType | None]:
    """One tensor as it is stored, its offset counted from the beginning of the data."""
    name = reader.string(limits.TENSOR_NAME_BYTES)
    axes = reader.number("I")
    if axes > limits.TENSOR_RANK:
        raise file.error(f"tensor {shown(name)}: {axes:,} axes, at most {limits.TENSOR_RANK}")
    shape = reader.numbers("Q", axes)[::-1]  # the file has the innermost first
    kind, offset = reader.number("I"), reader.number("Q")
    file.check_tensor(name, shape)
    if kind in PLAIN:
        return TensorEntry(name, PLAIN[kind], shape, file.path, offset), None
    if kind not in PACKED:
        known = ", ".join(["F32", "F16", "BF16", *(block.name for block in PACKED.values())])
        raise file.error(
            f"tensor {shown(name)} is of type {OTHERS.get(kind, kind)}; mmchat reads {known}"
        )
    block = PACKED[kind]
    if not shape or shape[-1] % block.values:
        raise file.error(
            f"tensor {shown(name)}: rows of {shape[-1] if shape else 1:,} are no whole blocks of"
            f" {block.values}, which {block.name} has"
        )
    stored = (*shape[:-1], shape[-1] // block.values * block.bytes)
    return TensorEntry(name, "uint8", stored, file.path, offset), block


def _placed(
    file: MappedFile,
    metadata: Mapping[str, Any],
    infos: list[tuple[TensorEntry, BlockType | None]],
    header_end: int,
) -> GgufHeader:
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment not in _ALIGNMENTS:
        raise file.error(f"its tensors are aligned to {shown(alignment)} bytes, no power of 2")
    start = -(-header_end // alignment) * alignment
    for entry, _ in infos:
        if entry.offset % alignment:
            raise file.error(f"tensor {shown(entry.name)}: its data is not aligned")
    entries = [replace(entry, offset=start + entry.offset) for entry, _ in infos]
    blocks = {entry.name: block for entry, block in infos if block}
    if len({entry.name for entry in entries}) < len(entries):
        raise file.error("two of its tensors have one name")
    return GgufHeader(metadata, file.in_order(entries), blocks)
