"""What the checkpoints of other quantisers have in common: weights that are unpacked by rows.

A packing reads `quantization_config`, finds the weights among the stored names and says how each is
made of them, as the library that wrote it does. Every size is checked before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.codes import Codes
from mmchat.checkpoints.computed import Computed, ComputedCheckpoint, PackedWeight
from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Source(TensorEntry):
    """A tensor as it is stored, of which a weight is made. checkpoint: has it."""

    checkpoint: Checkpoint

    def read(self) -> Tensor:
        return self.checkpoint.read(self.name)

    def beside(self, name: str) -> Source:
        """The tensor `name`, which belongs to this one."""
        found = source(self.checkpoint, name)
        if found is None:
            raise self.error(f"{shown(name)} is missing; download it again")
        return found

    def check(self, dtypes: str | tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Refuse a tensor of another dtype, or of none of the shapes."""
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        if self.dtype in dtypes and (not shapes or self.shape in shapes):
            return
        wanted = " or ".join(map(str, map(list, shapes)))
        found = f"{list(self.shape)} {self.dtype}"
        raise self.error(
            f"expected {wanted} {' or '.join(dtypes)}, found {found}; download it again"
        )

    def columns_of(self, parts: int, columns: int) -> int:
        """Columns that share a scale, where `parts` scales are for all."""
        if parts < 1 or columns % parts:
            raise self.error(f"{columns:,} columns do not share {parts:,} scales")
        return columns // parts

    def matrix(self) -> tuple[int, int]:
        """The shape, which must have two axes."""
        if len(self.shape) != 2:
            raise self.error(f"{list(self.shape)} is no matrix; download it again")
        return self.shape[0], self.shape[1]


def source(checkpoint: Checkpoint, name: str) -> Source | None:
    """The stored tensor of this name, if it is there."""
    entry = checkpoint.entries.get(name)
    return Source(**vars(entry), checkpoint=checkpoint) if entry else None


def ending(checkpoint: Checkpoint, suffix: str) -> Iterator[tuple[str, Source]]:
    """(name before it, tensor) of the stored tensors with this ending."""
    for name, entry in checkpoint.entries.items():
        if name.endswith(suffix):
            yield name.removesuffix(suffix), Source(**vars(entry), checkpoint=checkpoint)


def packed_weight(
    first: Source,
    shape: tuple[int, int],
    dtype: str,
    others: Iterable[Source | None],
    rows: Callable[[int, int], Tensor],
    codes: Callable[[int, int], Codes] | None,
) -> PackedWeight:
    """The weight that is made of `first` and of those `others` that are there. rows: of any
    dtype."""

    def rounded(begin: int, end: int) -> Tensor:
        import torch

        return rows(begin, end).to(getattr(torch, dtype))

    entry = TensorEntry(f"{first.name.rpartition('.')[0]}.weight", dtype, shape, first.file)
    sources = (first.name, *(other.name for other in others if other))
    return PackedWeight(entry=entry, sources=sources, rows=rounded, codes=codes)


class Packing:
    """One way of packing. label: its name for people; scheme: of mmchat.quant, nearest in bits."""

    label: str
    scheme: str

    def weights(self, stored: Checkpoint) -> Iterable[Computed | PackedWeight]:
        """What is computed of the stored tensors. Raises CheckpointError."""
        raise NotImplementedError

    def unpacked(self, stored: Checkpoint) -> ComputedCheckpoint:
        """The checkpoint with plain weights in place of packed ones. It closes `stored`."""
        try:
            made = list(self.weights(stored))
            if not made:
                raise CheckpointError(
                    f"{shown(stored.files[0])}: its config.json says {self.label}, but no tensor is"
                    " packed so; download both again"
                )
            remark = f"unpacked {len(made):,} weights of {self.label}"
            return ComputedCheckpoint(stored, made, remark)
        except BaseException:
            stored.close()
            raise


def one_of(found: Mapping[str, Any], key: str, known: tuple[Any, ...], default: Any) -> Any:
    """A value of a config that must be one of those known. Raises ValueError."""
    value = found.get(key)
    value = default if value is None else value
    if isinstance(value, list | dict) or value not in known:
        raise ValueError(f"{key} {shown(value)} is not read, only {', '.join(map(shown, known))}")
    return known[known.index(value)]  # 4, also where 4.0 is given


# Arithmetic


def unpacked_bytes(words: Tensor, bits: int) -> Tensor:
    """Words [n, m], little endian, as codes uint8 [n, 32 m/bits], the low bits first."""
    import torch

    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack((found & 15, found >> 4), dim=-1).flatten(-2)


def words_of(bits: int, count: int) -> int:
    """32-bit words that hold so many codes."""
    return math.ceil(count * bits / 32)
