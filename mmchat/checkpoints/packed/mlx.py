"""MLX: codes in words of 32 bits, a scale and a bias for each group of a row: w = code · scale +
bias. Its kernels of convolutions have the channels last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.codes import Codes
from mmchat.checkpoints.computed import Computed, PackedWeight
from mmchat.checkpoints.packed.base import (
    FLOATS,
    Packing,
    Source,
    ending,
    one_of,
    packed_weight,
    unpacked_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

_BITS, _GROUPS = (4, 8), (32, 64, 128)


class Mlx(Packing):
    """Modules may have sizes of their own in the config, by name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._sizes = {"": _sizes(config)}
        self._sizes |= {name: _sizes(of) for name, of in config.items() if isinstance(of, dict)}
        bits, group = self._sizes[""]
        self.label = f"MLX of {bits} bits"
        self.scheme = "int8" if bits == 8 else f"int4-g{group}"

    def weights(self, stored: Checkpoint) -> Iterator[Computed | PackedWeight]:
        for module, scale in ending(stored, ".scales"):
            sizes = self._sizes.get(module, self._sizes[""])
            yield _affine(scale.beside(f"{module}.weight"), scale, *sizes)
        for _, entry in ending(stored, ".patch_embedding.weight"):
            if len(entry.shape) == 4:
                yield _channels_first(entry)


def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """(bits, group size)."""
    one_of(config, "mode", ("affine",), "affine")
    return one_of(config, "bits", _BITS, 4), one_of(config, "group_size", _GROUPS, 64)


def _affine(packed: Source, scale: Source, bits: int, group: int) -> PackedWeight:
    packed.check("uint32")
    rows, words = packed.matrix()
    columns = words * (32 // bits)
    if columns % group:
        raise packed.error(f"{columns:,} columns are not groups of {group}")
    bias = packed.beside(scale.name.removesuffix("scales") + "biases")
    scale.check(FLOATS, (rows, columns // group))
    bias.check(scale.dtype, (rows, columns // group))

    def values(begin: int, end: int) -> Tensor:
        # each step is rounded to the dtype, as on MLX's CPU
        scales, biases = (part.read()[begin:end, :, None] for part in (scale, bias))
        levels = unpacked_bytes(packed.read()[begin:end], bits).unflatten(1, (-1, group))
        return (levels.to(scales.dtype) * scales + biases).flatten(1)

    def codes(begin: int, end: int) -> Codes:
        import torch

        scales, biases = (part.read()[begin:end].float() for part in (scale, bias))
        levels = packed.read()[begin:end].contiguous().view(torch.uint8)
        return Codes(levels, scales, biases + 8 * scales)

    own = codes if bits == 4 else None
    return packed_weight(packed, (rows, columns), scale.dtype, [scale, bias], values, own)


def _channels_first(entry: Source) -> Computed:
    n, height, width, channels = entry.shape
    made = replace(entry, shape=(n, channels, height, width))
    return Computed(made, (entry.name,), lambda: entry.read().permute(0, 3, 1, 2).contiguous())
