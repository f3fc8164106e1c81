"""GPTQ, AWQ and auto-round: the transposed weight in words of 32 bits, w = (code - zero) · scale.

GPTQ packs inputs and stores zeros less one, AWQ packs outputs, shuffled.
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
    matrix,
    one_of,
    packed_weight,
    unpacked_bytes,
    words_of,
)

if TYPE_CHECKING:
    from torch import Tensor

_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = [_OUTPUT_OF_NIBBLE.index(output) for output in range(8)]
_PACKINGS = (
    "auto_round", "auto_round:gptq", "auto_round:auto_gptq", "auto_gptq", "auto_round:awq",
    "auto_round:auto_awq", "auto_awq", "gptq", "awq",
)  # fmt: skip


class Gptq(Packing):
    """bits 4 or, of GPTQ, 8."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        method = str(config.get("quant_method"))
        packing = one_of(config, "packing_format", _PACKINGS, method.removeprefix("intel/"))
        self.is_awq = packing.endswith("awq")
        self.bits = one_of(config, "bits", (4,) if self.is_awq else (4, 8), 4)
        form = one_of(config, "checkpoint_format", ("gptq", "gptq_v2", "gemm"), "gptq")
        one_of(config, "version", ("gemm", "GEMM"), "gemm") if self.is_awq else None
        self.zero_less = 0 if self.is_awq or form == "gptq_v2" else 1
        self.label = {"gptq": "GPTQ", "awq": "AWQ"}.get(method, "auto-round")
        self.label += f" of {self.bits} bits"
        group = config.get("group_size")
        self.scheme = "int8" if self.bits == 8 else f"int4-g{group if group in (32, 64) else 128}"

    def weights(self, stored: Checkpoint) -> Iterator[PackedWeight]:
        for module, entry in ending(stored, ".qweight"):
            yield self._weight(stored, module, entry)

    def _weight(self, stored: Checkpoint, module: str, entry: TensorEntry) -> PackedWeight:
        bits, per_word, read = self.bits, 32 // self.bits, stored.read
        scale = beside(stored, entry, f"{module}.scales")
        zero = beside(stored, entry, f"{module}.qzeros")
        check(entry, "int32")
        check(scale, FLOATS)
        (inputs, outputs), (groups, rows) = matrix(entry), matrix(scale)
        columns = inputs if self.is_awq else inputs * per_word
        if rows != outputs * (per_word if self.is_awq else 1) or rows % per_word:
            fail(scale, f"{rows:,} outputs do not fit {list(entry.shape)} of {entry.name!r}")
        group = columns_of(scale, groups, columns)
        check(zero, "int32", (groups, words_of(bits, rows)))
        order = stored.entries.get(f"{module}.g_idx")
        sources = [scale.name, zero.name]
        if order:
            check(order, "int32", (columns,))
            sources.append(order.name)

        def levels(begin: int, end: int) -> Tensor:
            if self.is_awq:
                return _shuffled(read(entry.name)[:, begin // 8 : -(-end // 8)]).T
            return unpacked_bytes(read(entry.name)[:, begin:end].T, bits)

        def affine(begin: int, end: int) -> tuple[Tensor, Tensor]:
            """Scales and zeros, float32 [n, G]."""
            words = read(zero.name)[:, begin // per_word : -(-end // per_word)]
            found = _shuffled(words) if self.is_awq else unpacked_bytes(words, bits)
            zeros = found.T.float() + self.zero_less
            return read(scale.name)[:, begin:end].T.float(), zeros

        def group_of() -> Tensor:
            """The group of each input, int64 [K]: by `order`, or so many beside each other."""
            import torch

            if order is None:
                return torch.arange(columns) // group
            found = read(order.name).long()
            if int(found.min()) < 0 or int(found.max()) >= groups:
                fail(order, f"names groups beyond the {groups:,} that there are")
            return found

        def values(begin: int, end: int) -> Tensor:
            import torch

            scales, zeros = affine(begin, end)
            at = group_of()
            wide = (levels(begin, end).float() - zeros[:, at]) * scales[:, at]
            return wide.to(getattr(torch, scale.dtype))

        def codes(begin: int, end: int) -> Codes:
            import torch

            scales, zeros = affine(begin, end)
            if order and not torch.equal(group_of(), torch.arange(columns) // group):
                return Codes(levels(begin, end), scales[:, :0])  # of no format of ours
            found = levels(begin, end)
            packed = found[:, ::2] | found[:, 1::2] << 4
            return Codes(packed, scales, (8 - zeros) * scales)

        return packed_weight(
            entry,
            (rows, columns),
            scale.dtype,
            sources,
            values,
            codes if bits == 4 else None,
        )


def _shuffled(words: Tensor) -> Tensor:
    """AWQ's words [m, n/8] as codes uint8 [m, n], in the order of the outputs."""
    return unpacked_bytes(words, 4).unflatten(1, (-1, 8))[..., _PLACE].flatten(1)
