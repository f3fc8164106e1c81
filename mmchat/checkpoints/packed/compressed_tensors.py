"""compressed-tensors: float8 or int8 with scales by rows or one for all, whole numbers of 4 or 8
bits packed into words with scales by groups; and fbgemm's float8, which is laid out like the first.

Activations, which servers round as well, stay as they are here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.codes import Codes
from mmchat.checkpoints.computed import PackedWeight
from mmchat.checkpoints.packed.base import (
    FLOATS,
    Packing,
    Source,
    ending,
    one_of,
    packed_weight,
    source,
    unpacked_bytes,
    words_of,
)

if TYPE_CHECKING:
    from torch import Tensor

_SCHEMES = {  # format -> what it is called, and ours
    "float-quantized": ("FP8", "fp8"),
    "int-quantized": ("W8A8", "int8"),
    "naive-quantized": ("of 8 bits", "int8"),
    "pack-quantized": ("W4A16", "int4-g128"),
}
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class CompressedTensors(Packing):
    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("quant_method") == "fbgemm_fp8":
            self.label, self.scheme = "fbgemm FP8", "fp8"
            return
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise ValueError("sparse weights are not read")
        kind, self.scheme = _SCHEMES[one_of(config, "format", tuple(_SCHEMES), None)]
        groups = config.get("config_groups")
        sizes = [
            group["weights"].get("group_size")
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        ]
        if self.scheme == "int4-g128" and sizes and sizes[0] in (32, 64):
            self.scheme = f"int4-g{sizes[0]}"
        self.label = f"compressed-tensors {kind}"

    def weights(self, stored: Checkpoint) -> Iterator[PackedWeight]:
        for module, scale in ending(stored, ".weight_scale"):
            unused = [source(stored, f"{module}.{name}") for name in _OF_ACTIVATIONS]
            if packed := source(stored, f"{module}.weight_packed"):
                yield _in_words(module, packed, scale, unused)
            else:
                yield _by_rows(scale.beside(f"{module}.weight"), scale, unused)


def _by_rows(packed: Source, scale: Source, unused: list[Source | None]) -> PackedWeight:
    packed.check(("float8_e4m3fn", "int8"))
    rows, columns = packed.matrix()
    scale.check(FLOATS, (rows, 1), (1,), ())
    dtype = "bfloat16" if scale.dtype == "float32" else scale.dtype

    def codes(begin: int, end: int) -> Codes:
        scales = scale.read().float().reshape(-1, 1).expand(rows, 1)[begin:end]
        return Codes(packed.read()[begin:end], scales)

    def values(begin: int, end: int) -> Tensor:
        found = codes(begin, end)
        return found.levels.float() * found.scale

    return packed_weight(packed, (rows, columns), dtype, [scale, *unused], values, codes)


def _in_words(
    module: str, packed: Source, scale: Source, unused: list[Source | None]
) -> PackedWeight:
    size = packed.beside(f"{module}.weight_shape")
    size.check(("int64", "int32"), (2,))
    rows, columns = map(int, size.read().tolist())
    if not (0 < rows < 2**31 and 0 < columns < 2**31):
        raise size.error(f"[{rows}, {columns}] is no shape of a weight")
    packed.check("int32", (rows, words_of(4, columns)), (rows, words_of(8, columns)))
    bits = 4 if packed.shape[1] == words_of(4, columns) else 8
    scale.check(FLOATS)
    if scale.matrix()[0] != rows:
        raise scale.error(f"expected {rows:,} rows, found {scale.shape[0]:,}")
    group = scale.columns_of(scale.shape[1], columns)
    zero = source(packed.checkpoint, f"{module}.weight_zero_point")
    if zero:  # packed along the rows
        zero.check("int32", (words_of(bits, rows), scale.shape[1]))
    middle = 1 << (bits - 1)

    def zeros(begin: int, end: int) -> Tensor:
        """float32 [n, G]."""
        if zero is None:
            return scale.read()[begin:end].float() * 0 + middle
        per_word = 32 // bits
        words = zero.read()[begin // per_word : -(-end // per_word)]
        return unpacked_bytes(words.T, bits).T[: end - begin].float()

    def values(begin: int, end: int) -> Tensor:
        levels = unpacked_bytes(packed.read()[begin:end], bits)[:, :columns]
        wide = levels.float().unflatten(1, (-1, group)) - zeros(begin, end)[..., None]
        return (wide * scale.read()[begin:end].float()[..., None]).flatten(1)

    def codes(begin: int, end: int) -> Codes:
        import torch

        words, scales = packed.read()[begin:end], scale.read()[begin:end].float()
        if bits == 8:
            return Codes((words.contiguous().view(torch.uint8) ^ 128).view(torch.int8), scales)
        offset = (middle - zeros(begin, end)) * scales
        return Codes(words.contiguous().view(torch.uint8), scales, offset)

    fits = columns % (32 // bits) == 0 and (bits == 4 or (group == columns and not zero))
    others, own = [scale, size, zero, *unused], codes if fits else None
    return packed_weight(packed, (rows, columns), scale.dtype, others, values, own)
