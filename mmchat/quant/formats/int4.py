"""int4: 16 levels with a scale and a zero for each group of weights, w = (q - 8) · scale + zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.quant import kernels
from mmchat.quant.formats.base import Format, Stored

if TYPE_CHECKING:
    from torch import Tensor

# Rows of torch's own int4 kernel: it asks for a multiple of 16 and takes 64 together.
PACKED_MULTIPLE, PACKED_ROWS = 16, 64


@dataclass(frozen=True)
class Int4(Format["Tensor", "Tensor", "Tensor"]):
    """weight: uint8 [N, K/2], byte j holds the elements 2j (low half) and 2j + 1, each 0..15;
    weight_scale, weight_zero: bfloat16 [N, K/group_size]. group_size: 32, 64 or 128."""

    group_size: int

    name = "int4"
    operator = "linear_int4"
    repacks = True

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        weight, groups = (rows, columns // 2), ("bfloat16", (rows, columns // self.group_size))
        return {"weight": ("uint8", weight), "weight_scale": groups, "weight_zero": groups}

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantize = kernels.ops.rounding(weight).quantize_int4
        return kernels.ops.by_rows(lambda rows: quantize(rows, self.group_size), weight)

    def widen(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return kernels.reference.widen_int4(weight, scale, zero)

    def on_cpu(self, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ops = kernels.ops
        if library := ops.library_for(x):
            return ops.rounded(library.linear_int4, library.widen_int4, x, weight, scale, zero)
        return super().on_cpu(x, weight, scale, zero)

    def repack(
        self, weight: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Format, dict[str, Tensor]] | None:
        """The order of torch's own kernel, where no compiled one serves the weights."""
        if kernels.native.library() is not None or weight.device.type != "cpu":
            return None
        if weight.shape[0] % PACKED_MULTIPLE:
            return None
        import torch

        packed = torch.empty_like(weight)
        for begin, end in kernels.ops.spans(len(weight), 8 * weight.shape[1], PACKED_ROWS):
            rows = weight[begin:end]  # whose levels take 8 bytes a byte, as int32
            levels = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1).to(torch.int32)
            packed[begin:end] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        groups = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()
        return PackedInt4(), {"weight": packed, "weight_scale": groups}


class PackedInt4(Format["Tensor", "Tensor"]):
    """int4 in the order of torch's own kernel for this processor: weight: uint8 [N, K/2],
    weight_scale: bfloat16 [K/group_size, N, 2], scale and zero."""

    name = "int4"
    is_portable = False

    def product(self, x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        import torch

        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return kernels.ops.shaped(multiply(rows, weight, x.shape[-1] // len(groups), groups), x)
