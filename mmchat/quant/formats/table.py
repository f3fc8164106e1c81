"""nf4 and fp4: 4 bits that choose one of 16 numbers, as bitsandbytes has them, and a scale."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mmchat.quant import kernels
from mmchat.quant.formats.blocks import Blocks
from mmchat.quant.kernels.layout import ROWS, TABLE

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.checkpoints.codes import Codes

_NEAR = 0.005  # of a table of theirs to ours, of which the largest number is 1


class Table(Blocks):
    """Blocks of 64 columns. numbers: whole ones, `size` times those of bitsandbytes: products are
    of bytes. That is the size with the smallest error, for normal weights: 0.5 % with NF4, whose
    numbers are 9.2 % off the weights, and 0.3 % with FP4."""

    bits = TABLE
    numbers: ClassVar[tuple[int, ...]]
    size: ClassVar[float]

    @property
    def table(self) -> Tensor:
        return _as_bytes(self.numbers)

    def quantize(self, weight: Tensor) -> tuple[Tensor]:
        reference = kernels.blocks_reference

        def rounded(rows: Tensor) -> tuple[Tensor]:
            return (reference.pack(TABLE, reference.quantize_table(rows, self.table)),)

        return kernels.ops.by_rows(rounded, weight, ROWS)

    def adopt(self, codes: Codes) -> tuple[Tensor] | None:
        if codes.table is None:
            return None
        ours = (self.table.float() - 128) / self.size
        if (codes.table.float() - ours).abs().max() > _NEAR:
            return None
        return super().adopt(replace(codes, scale=codes.scale / self.size))


@functools.cache
def _as_bytes(numbers: tuple[int, ...]) -> Tensor:
    """uint8 [16], the numbers and 128."""
    import torch

    return (torch.tensor(numbers) + 128).to(torch.uint8)


class NormalFloat4(Table):
    """NF4."""

    name, operator, size = "nf4", "linear_nf4", 124.12
    numbers = (-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124)


class Float4(Table):
    """FP4."""

    name, operator, size = "fp4", "linear_fp4", 120.0
    numbers = (0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30)


NF4, FP4 = NormalFloat4(), Float4()
