"""Weights that are not quantised: numbers of 16 or 32 bits, in the dtype of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.quant import kernels
from mmchat.quant.formats.base import Format, Stored

if TYPE_CHECKING:
    from torch import Tensor


class Plain(Format["Tensor"]):
    """weight [N, K]. Those in bfloat16 are read on the CPU at the speed of memory."""

    name = "none"
    operator = "linear_bf16"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": ("", (rows, columns))}

    def widen(self, weight: Tensor) -> Tensor:
        return weight.float()

    def on_cpu(self, x: Tensor, weight: Tensor) -> Tensor:
        ops = kernels.ops
        fast, tokens = ops.has_fast_bf16(), ops.tokens(x)
        few = ops.FEW_TOKENS if fast else ops.FEW_TOKENS_OF_BF16
        if tokens <= few and weight.is_contiguous() and (library := ops.library_for(x)):
            return ops.by_kernel(library.linear_bf16, x, weight)
        if fast or tokens == 1:
            return (x.to(weight.dtype) @ weight.T).to(x.dtype)
        return ops.in_chunks(lambda rows: rows, x, weight)


PLAIN = Plain()
