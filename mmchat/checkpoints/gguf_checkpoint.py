"""A checkpoint in GGUF: a file that holds all, or one of the text and a second one of the vision.

Packed tensors are widened when they are read; what they stand for is float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint, Parts
from mmchat.checkpoints.computed import Computed, ComputedCheckpoint, PackedWeight
from mmchat.checkpoints.gguf_blocks import BlockType, widened
from mmchat.checkpoints.gguf_file import GgufHeader, gguf_at, read_header
from mmchat.checkpoints.mapped_file import MappedFile, TensorEntry, shown
from mmchat.checkpoints.packed.base import Packing
from mmchat.errors import CheckpointError

if TYPE_CHECKING:
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

    packed: the tensors as they are stored. blocks: the types of those that are packed, by name.
    packing: None where nothing is.
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
        super().__init__(stored, [_wide(stored, *named) for named in self.blocks.items()])
        self.packing: GgufPacking | None = None
        if wide := self.computed.values():
            packed_bytes = sum(self.packed[name].num_bytes for name in self.blocks)
            self.packing = GgufPacking(8 * packed_bytes / sum(one.entry.numel for one in wide))

    def bytes_by_kind(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, entry in self.packed.items():
            kind = self.blocks[name].name if name in self.blocks else entry.dtype
            found[kind] += entry.num_bytes
        return dict(found)


def _wide(stored: Checkpoint, name: str, block: BlockType) -> Computed | PackedWeight:
    packed, read = stored.entries[name], partial(stored.read, name)
    columns = packed.shape[-1] // block.bytes * block.values
    entry = replace(packed, dtype="float32", shape=(*packed.shape[:-1], columns))
    if len(entry.shape) == 2:
        return gguf_weight(entry, block, read)
    return Computed(entry, (name,), lambda: widened(block, read(), entry.shape))


def gguf_weight(entry: TensorEntry, block: BlockType, read: Callable[[], Tensor]) -> PackedWeight:
    """A matrix [N, K], which `read` gives as uint8 [N, bytes of a row]."""

    def ordered(order: Tensor) -> PackedWeight:
        packed = read()[order]
        return gguf_weight(entry, block, lambda: packed)

    def rows(begin: int, end: int) -> Tensor:
        return widened(block, read()[begin:end], (end - begin, entry.shape[1]))

    return PackedWeight(
        entry=entry,
        sources=(entry.name,),
        rows=rows,
        codes=lambda begin, end: block.codes(read()[begin:end]),
        ordered=ordered,
    )


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
