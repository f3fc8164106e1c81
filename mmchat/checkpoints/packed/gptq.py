"""GPTQ, AWQ and auto-round: the transposed weight in words of 32 bits, w = (code - zero) · scale.

GPTQ packs inputs and stores zeros less one, AWQ packs outputs, shuffled.
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
        for module, packed in ending(stored, ".qweight"):
            yield self._weight(module, packed)

    def _weight(self, module: str, packed: Source) -> PackedWeight:
        bits, per_word = self.bits, 32 // self.bits
        scale = packed.beside(f"{module}.scales")
        zero = packed.beside(f"{module}.qzeros")
        packed.check("int32")
        scale.check(FLOATS)
        (inputs, outputs), (groups, rows) = packed.matrix(), scale.matrix()
        columns = inputs if self.is_awq else inputs * per_word
        if rows != outputs * (per_word if self.is_awq else 1) or rows % per_word:
            raise scale.error(
                f"{rows:,} outputs do not fit {list(packed.shape)} of {packed.name!r}"
            )
        group = scale.columns_of(groups, columns)
        zero.check("int32", (groups, words_of(bits, rows)))
        order = source(packed.checkpoint, f"{module}.g_idx")
        if order:
            order.check("int32", (columns,))

        def levels(begin: int, end: int) -> Tensor:
            if self.is_awq:
                return _shuffled(packed.read()[:, begin // 8 : -(-end // 8)]).T
            return unpacked_bytes(packed.read()[:, begin:end].T, bits)

        def affine(begin: int, end: int) -> tuple[Tensor, Tensor]:
            """Scales and zeros, float32 [n, G]."""
            words = zero.read()[:, begin // per_word : -(-end // per_word)]
            found = _shuffled(words) if self.is_awq else unpacked_bytes(words, bits)
            zeros = found.T.float() + self.zero_less
            return scale.read()[:, begin:end].T.float(), zeros

        def group_of() -> Tensor:
            """The group of each input, int64 [K]: by `order`, or so many beside each other."""
            import torch

            if order is None:
                return torch.arange(columns) // group
            found = order.read().long()
            if int(found.min()) < 0 or int(found.max()) >= groups:
                raise order.error(f"names groups beyond the {groups:,} that there are")
            return found

        def values(begin: int, end: int) -> Tensor:
            scales, zeros = affine(begin, end)
            at = group_of()
            return (levels(begin, end).float() - zeros[:, at]) * scales[:, at]

        def codes(begin: int, end: int) -> Codes:
            import torch

            scales, zeros = affine(begin, end)
            if order and not torch.equal(group_of(), torch.arange(columns) // group):
                return Codes(levels(begin, end), scales[:, :0])  # of no format of ours
            found = levels(begin, end)
            pairs = found[:, ::2] | found[:, 1::2] << 4
            return Codes(pairs, scales, (8 - zeros) * scales)

        others, own = [scale, zero, order], codes if bits == 4 else None
        return packed_weight(packed, (rows, columns), scale.dtype, others, values, own)


def _shuffled(words: Tensor) -> Tensor:
    """AWQ's words [m, n/8] as codes uint8 [m, n], in the order of the outputs."""
    return unpacked_bytes(words, 4).unflatten(1, (-1, 8))[..., _PLACE].flatten(1)
