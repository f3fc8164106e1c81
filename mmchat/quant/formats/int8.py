"""int8: whole numbers with one scale for each row, w = q · scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.quant import kernels
from mmchat.quant.formats.base import Format, Stored, adopted_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.checkpoints.codes import Codes


class Int8(Format["Tensor", "Tensor"]):
    """weight: int8 [N, K], weight_scale: float32 [N]."""

    name = "int8"
    operator = "linear_int8"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": ("int8", (rows, columns)), "weight_scale": ("float32", (rows,))}

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.ops.by_rows(kernels.ops.rounding(weight).quantize_int8, weight)

    def adopt(self, codes: Codes) -> tuple[Tensor, Tensor] | None:
        return adopted_rows(codes, "int8")

    def widen(self, weight: Tensor, scale: Tensor) -> Tensor:
        return kernels.reference.widen_int8(weight, scale)

    def on_cpu(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ops = kernels.ops
        if library := ops.library_for(x):
            return ops.rounded(library.linear_int8, library.widen_int8, x, weight, scale)
        if ops.tokens(x) <= ops.FEW_TOKENS:
            import torch

            rows = x.reshape(-1, x.shape[-1]).bfloat16()
            multiply = torch.ops.aten._weight_int8pack_mm
            return ops.shaped(multiply(rows, weight, scale.bfloat16()), x)
        return super().on_cpu(x, weight, scale)

    def on_gpu(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        # scaling the product and not the weights lets a compiler read int8 from memory
        return x @ weight.to(x.dtype).T * scale.to(x.dtype)


INT8 = Int8()
