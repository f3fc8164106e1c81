"""A checkpoint in GGUF: a file that holds all, or one of the text and a second one of the vision.

Packed tensors are widened when they are read; what they stand for is float32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmchat.checkpoints.checkpoint import Checkpoint, Parts
from mmchat.checkpoints.codes import Codes
from mmchat.checkpoints.computed import Computed, ComputedCheckpoint, Read
from mmchat.checkpoints.gguf_blocks import BlockType, widened
from mmchat.checkpoints.gguf_file import GgufHeader, gguf_at, read_header
from mmchat.checkpoints.mapped_file import MappedFile, TensorEntry, shown
from mmchat.checkpoints.packed.base import Packing
from mmchat.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_VISION, _TEXT = "v.", "token_embd.weight"  # what only the vision part, only the text part has


Parsed = list[tuple[MappedFile, GgufHeader]]


class GgufPacking(Packing):
    """Numbers of so many bits on average, each tensor in blocks of its own type."""

    label = "GGUF"

    def __init__(self, bits: float) -> None:
        # int4-b32 has 4.6, but 5.5 are to be int6
        nearest = {"none": 16.0, "int8-b32": 8.5, "int6": 6.6, "int4-b32": 4.3}
        self.scheme = min(nearest, key=lambda name: abs(nearest[name] - bits))


class GgufCheckpoint(ComputedCheckpoint):
    """The tensors of one model by their names in GGUF. metadata: of both files; the first wins.

    packed: the tensors as they are stored. blocks: the types of those that are, by name. packing:
    None where nothing is packed.
    """

    def __init__(self, files: Parsed) -> None:
        parts: Parts = {}
        self.metadata: dict[str, Any] = {}
        self.blocks: dict[str, BlockType] = {}
        for file, header in files:
            for entry in header.entries:
                if entry.name in parts:
                    other = shown(files[0][0].path.name)
                    raise file.error(f"tensor {shown(entry.name)} is also in {other}")
                parts[entry.name] = [(file, entry)]
            self.metadata = {**header.metadata, **self.metadata}
            self.blocks |= header.blocks
        stored = Checkpoint("gguf", [file for file, _ in files], parts, {}, [])
        self.packed = stored.entries
        super().__init__(stored, (self._wide(name) for name in self.blocks))

        matrices = [(self.packed[n], b) for n, b in self.blocks.items()]
        self.packing: GgufPacking | None = None
        if numbers := sum(e.num_bytes * b.values // b.bytes for e, b in matrices):
            self.packing = GgufPacking(8 * sum(e.num_bytes for e, _ in matrices) / numbers)

    def _wide(self, name: str) -> Computed:
        return Computed(self._entry(name), (name,), partial(_read_whole, self, name))

    def _entry(self, name: str) -> TensorEntry:
        packed, block = self.packed[name], self.blocks[name]
        columns = packed.shape[-1] // block.bytes * block.values
        return replace(packed, dtype="float32", shape=(*packed.shape[:-1], columns))

    def rows(self, name: str) -> Tensor:
        """The tensor, or WideRows in its place, so that a large one is never whole in float32."""
        if name not in self.blocks or len(self.entries[name].shape) != 2:
            return self.read(name)
        rows = WideRows(self.entries[name], self.blocks[name], self._stored.read(name))
        return cast("Tensor", rows)

    def bytes_by_kind(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, entry in self.packed.items():
            kind = self.blocks[name].name if name in self.blocks else entry.dtype
            found[kind] += entry.num_bytes
        return dict(found)


def _read_whole(checkpoint: GgufCheckpoint, name: str, read: Read) -> Tensor:
    import torch

    out = torch.empty(checkpoint.entries[name].shape, dtype=torch.float32)
    return widened(checkpoint.blocks[name], read(name), out)


class WideRows:
    """A packed matrix in place of its float32 tensor, as far as loading and export use that.

    Rows are widened when a slice of them is taken, `to` gives them all in another dtype; an index
    of all of them brings them into another order. entry, rows, codes: as of PackedWeight.
    """

    def __init__(self, entry: TensorEntry, block: BlockType, packed: Tensor) -> None:
        import torch

        self.entry, self._block, self._packed = entry, block, packed
        self.shape, self.dtype = entry.shape, torch.float32

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor | WideRows:
        if isinstance(rows, slice):
            return self._widened(self._packed[rows], self.dtype)
        return WideRows(self.entry, self._block, self._packed[rows])

    def codes(self, begin: int, end: int) -> Codes:
        return self._block.codes(self._packed[begin:end])

    def rows(self, begin: int, end: int) -> Tensor:
        return self._widened(self._packed[begin:end], self.dtype)

    def float(self) -> Tensor:
        return self.to(self.dtype)

    def to(self, dtype: torch.dtype) -> Tensor:
        return self._widened(self._packed, dtype)

    def _widened(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        import torch

        out = torch.empty(len(packed), self.shape[1], dtype=dtype)
        return widened(self._block, packed, out)


def open_gguf(path: Path, companion: Path | None = None) -> GgufCheckpoint:
    """Open a file, or those of a folder. companion: the file of the vision part, if that is known.

    A file that has the text alone is joined by the one beside it that has the vision alone. Raises
    CheckpointError.
    """
    files: list[MappedFile] = []
    try:
        return GgufCheckpoint(_chosen(path, companion, files))
    except BaseException:
        for file in files:
            file.close()
        raise


def _chosen(path: Path, companion: Path | None, files: list[MappedFile]) -> Parsed:
    """The files of a model with their headers, the text first; `files` takes all it opens."""

    def parsed(one: Path) -> tuple[MappedFile, GgufHeader]:
        files.append(MappedFile(one))
        return files[-1], read_header(files[-1])

    found = [parsed(one) for one in gguf_at(path) or [path]]
    texts = [one for one in found if _has(one, _TEXT)]
    if len(texts) != 1:
        names = ", ".join(shown(file.path.name) for file, _ in found[:5])
        what = "text of a model" if texts else "vision part of a model"
        advice = "name one of them" if texts else "name the file of the text"
        raise CheckpointError(f"{shown(path)}: holds the {what}: {names}; {advice}")
    if _has(texts[0], _VISION):
        return texts
    if companion is not None:
        return [*texts, parsed(companion)]
    if not path.is_dir():
        beside = (one for one in gguf_at(path.parent) if one.resolve() != path.resolve())
        found = [parsed(one) for one in beside]
    visions = [one for one in found if _has(one, _VISION) and not _has(one, _TEXT)]
    if len(visions) == 1:
        return [*texts, visions[0]]
    which = "several files with it are" if visions else "none is"
    raise texts[0][0].error(
        f"has the text of a model without its vision part, and {which} beside it; give that file"
        " with --vision-tower FILE"
    )


def _has(one: tuple[MappedFile, GgufHeader], name: str) -> bool:
    return any(entry.name.startswith(name) for entry in one[1].entries)
