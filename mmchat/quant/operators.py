"""The products of the formats on the CPU as operators of torch (`torch.ops.mmchat`).

So torch.compile keeps them whole, and programs that were compiled ahead of time call them.
"""

from __future__ import annotations

from torch import Tensor

from mmchat.quant.formats.base import Format
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, BLOCKS8
from mmchat.quant.formats.int4 import Int4, PackedInt4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.formats.table import FP4, NF4
from mmchat.quant.kernels.ops import register


def _product(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def register_product(format: Format) -> None:
    """Make `format.on_cpu` the operator that compiled programs call."""
    arguments = ", ".join(f"Tensor {name}" for name in ("x", *format.tensors(64, 64)))
    register(format.operator, f"({arguments}) -> Tensor", format.on_cpu, _product)


# the size of the groups follows from the tensors
for _format in (PLAIN, INT8, Int4(64), PackedInt4(64), BLOCKS4, BLOCKS6, BLOCKS8, NF4, FP4):
    register_product(_format)
