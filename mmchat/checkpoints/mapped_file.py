"""Open one file of weights and map its tensors. The only place that opens a checkpoint file.

A tensor is described by its place in the file, which pure Python finds in the header. Nothing is
unpickled, and nothing is allocated because a file says so.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat import limits
from mmchat.errors import CheckpointError, MemoryError_, quoted
from mmchat.storage.safe_files import open_regular
from mmchat.strict_json import foreign_content

if TYPE_CHECKING:
    import torch

# Bytes of one element, by torch's name of the dtype.
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint64": 8, "uint32": 4, "uint16": 2,
}  # fmt: skip

# Linux must not count a private mapping as memory that may be needed: a file may be larger than the
# memory. Python 3.11 has no name for the flag.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_HEAD_BYTES = 512


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it; `offset` is the byte of `file` where its data begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """The byte of `file` behind its data."""
        return self.offset + self.num_bytes

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{shown(self.file)}: tensor {shown(self.name)}: {reason}")


def shown(name: object) -> str:
    """A name from outside, safe to print: quoted, control characters escaped, length bounded."""
    return quoted(str(name), width=300)


class MappedFile:
    """A regular file, open for reading; tensors are views of a private mapping of it.

    Raises CheckpointError when it is missing, unreadable, no regular file, or plainly no weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            self._file = io.BufferedReader(open_regular(path.resolve()))
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "the name is not valid"
            raise self.error(f"cannot be opened: {reason}; name a file of weights") from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            if reason := explain_non_weights(self.read_at(0, min(self.size, _HEAD_BYTES))):
                raise self.error(reason)
        except CheckpointError:
            self._file.close()
            raise

    def in_order(self, entries: Iterable[TensorEntry]) -> list[TensorEntry]:
        """Sorted by their places. Raises CheckpointError if two share their data, or if the file
        ends before the last one does."""
        found = sorted(entries, key=lambda entry: entry.offset)
        for before, after in pairwise(found):
            if before.end > after.offset:
                raise self.error(
                    f"tensors {shown(before.name)} and {shown(after.name)} share their data"
                )
        for entry in found:
            if entry.end > self.size:
                raise self.error(
                    f"is cut off in tensor {shown(entry.name)}: {self.size:,} bytes of"
                    f" {found[-1].end:,}; download it again"
                )
        return found

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{shown(self.path)}: {reason}")

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; CheckpointError when the file ends before."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.error(
                f"ends after {self.size:,} bytes, {offset + length:,} needed; download it again"
            )
        try:
            self._file.seek(offset)
            data = self._file.read(length)
        except (OSError, OverflowError) as error:
            raise self.error(f"cannot be read: {error}") from None
        if len(data) < length:
            raise self.error("became shorter while it was read")
        return data

    def duplicate(self) -> int:
        """Another descriptor of the same open file; the caller closes it."""
        return os.dup(self._file.fileno())

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse names that are no text or too long, and shapes with empty or too many axes."""
        most, is_text = limits.TENSOR_NAME_BYTES, name.encode(errors="replace").decode() == name
        if not is_text or len(name.encode()) > most:
            raise self.error(
                f"a tensor name is not text, or longer than {most} bytes: {shown(name)}"
            )
        if len(shape) > limits.TENSOR_RANK or 0 in shape:
            raise self.error(
                f"tensor {shown(name)}: {len(shape)} axes, {list(shape)}; at most"
                f" {limits.TENSOR_RANK} are read, and none that is empty"
            )

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor of `entry` as a view of the file: nothing is read until it is used.

        Writing to it changes the view only, never the file.
        """
        import torch

        dtype: torch.dtype = getattr(torch, entry.dtype)
        buffer, offset = self._mapping(), entry.offset
        if offset % ITEM_BYTES[entry.dtype]:  # torch must not read unaligned elements: copy
            buffer, offset = bytearray(buffer[offset : offset + entry.num_bytes]), 0
        flat = torch.frombuffer(buffer, dtype=dtype, count=entry.numel, offset=offset)
        return flat.reshape(entry.shape)

    def release(self, entry: TensorEntry) -> None:
        """Give the pages of `entry` back; they are read again from the file when used again.

        What was written into the view is lost.
        """
        page = mmap.PAGESIZE
        first = -(-entry.offset // page) * page
        length = entry.end // page * page - first
        if self._map is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Close the file. Tensors stay valid: the mapping lives as long as the last of them."""
        self._file.close()
        self._map = None

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            try:
                self._map = mmap.mmap(
                    self._file.fileno(),
                    self.size,
                    flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                    raise MemoryError_(
                        f"{shown(self.path)}: no room to map its {self.size:,} bytes; is the"
                        " address space limited (ulimit -v)?"
                    ) from None
                raise self.error(f"cannot be mapped: {error}") from None
        return self._map


def explain_non_weights(head: bytes) -> str | None:
    """Why a file that begins with `head` holds no weights, and what to do; None when it may."""
    if not head:
        return "is empty; download it again"
    if foreign := foreign_content(head):
        return f"is {foreign}"
    if head.startswith(b"\x1f\x8b") or head.startswith((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is compressed; unpack it first"
    sample = head[:64]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in sample):
        begin = shown(sample.decode())
        return f"is text, not weights: {begin}; a server's error? download it again"
    return None
