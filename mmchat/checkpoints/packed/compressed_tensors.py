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
from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.checkpoints.packed.base import (
    FLOATS,
    Packing,
    beside,
    check,
    columns_of,
    ending,
    fail,
    grouped,
    matrix,
    one_of,
    packed_weight,
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
            packed = stored.entries.get(f"{module}.weight_packed")
            unused = [n for end in _OF_ACTIVATIONS if (n := f"{module}.{end}") in stored.entries]
            if packed:
                yield _in_words(stored, packed, scale, unused)
            else:
                yield _by_rows(stored, beside(stored, scale, f"{module}.weight"), scale, unused)


def _by_rows(
    stored: Checkpoint, entry: TensorEntry, scale: TensorEntry, unused: list[str]
) -> PackedWeight:
    check(entry, ("float8_e4m3fn", "int8"))
    (rows, columns), read = matrix(entry), stored.read
    check(scale, FLOATS, (rows, 1), (1,), ())
    dtype = "bfloat16" if scale.dtype == "float32" else scale.dtype

    def codes(begin: int, end: int) -> Codes:
        scales = read(scale.name).float().reshape(-1, 1).expand(rows, 1)[begin:end]
        return Codes(read(entry.name)[begin:end], scales)

    def values(begin: int, end: int) -> Tensor:
        import torch

        found = codes(begin, end)
        return (found.levels.float() * found.scale).to(getattr(torch, dtype))

    return packed_weight(entry, (rows, columns), dtype, [scale.name, *unused], values, codes)


def _in_words(
    stored: Checkpoint, entry: TensorEntry, scale: TensorEntry, unused: list[str]
) -> PackedWeight:
    module, read = entry.name.removesuffix(".weight_packed"), stored.read
    size = beside(stored, entry, f"{module}.weight_shape")
    check(size, ("int64", "int32"), (2,))
    rows, columns = map(int, read(size.name).tolist())
    if not (0 < rows < 2**31 and 0 < columns < 2**31):
        fail(size, f"[{rows}, {columns}] is no shape of a weight")
    check(entry, "int32", (rows, words_of(4, columns)), (rows, words_of(8, columns)))
    bits = 4 if entry.shape[1] == words_of(4, columns) else 8
    check(scale, FLOATS)
    if matrix(scale)[0] != rows:
        fail(scale, f"expected {rows:,} rows, found {scale.shape[0]:,}")
    group = columns_of(scale, scale.shape[1], columns)
    zero = stored.entries.get(f"{module}.weight_zero_point")
    if zero:  # packed along the rows
        check(zero, "int32", (words_of(bits, rows), scale.shape[1]))
    sources = [scale.name, size.name, *([zero.name] if zero else []), *unused]
    middle = 1 << (bits - 1)

    def zeros(begin: int, end: int) -> Tensor:
        """float32 [n, G]."""
        if zero is None:
            return read(scale.name)[begin:end].float() * 0 + middle
        per_word = 32 // bits
        words = read(zero.name)[begin // per_word : -(-end // per_word)]
        return unpacked_bytes(words.T, bits).T[: end - begin].float()

    def values(begin: int, end: int) -> Tensor:
        import torch

        levels = unpacked_bytes(read(entry.name)[begin:end], bits)[:, :columns]
        scales = read(scale.name)[begin:end]
        return grouped(levels, scales, zeros(begin, end)).to(getattr(torch, scale.dtype))

    def codes(begin: int, end: int) -> Codes:
        import torch

        words, scales = read(entry.name)[begin:end], read(scale.name)[begin:end].float()
        if bits == 8:
            return Codes((words.contiguous().view(torch.uint8) ^ 128).view(torch.int8), scales)
        offset = (middle - zeros(begin, end)) * scales
        return Codes(words.contiguous().view(torch.uint8), scales, offset)

    fits = columns % (32 // bits) == 0 and (bits == 4 or (group == columns and not zero))
    return packed_weight(
        entry, (rows, columns), scale.dtype, sources, values, codes if fits else None
    )
