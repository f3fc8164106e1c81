"""Blocks of 4, 6 or 8 bits: scales of few bits under that of a row or block, in one stream."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from mmchat.quant import kernels
from mmchat.quant.formats.base import Format, Stored
from mmchat.quant.kernels.layout import LARGE, LARGES, PART, ROWS, row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.checkpoints.codes import Codes as TheirCodes


class Blocks(Format["Tensor"]):
    """weight: uint8 [N, bytes of a row], as kernels.blocks_reference has it. N is a multiple of 8
    and K of 64, so that the kernel reads it where it lies in a file."""

    bits: ClassVar[int]

    @property
    def whole(self) -> tuple[int, int]:
        return ROWS, LARGE if LARGES[self.bits] else PART

    @property
    def table(self) -> Tensor | None:
        """uint8 [16], where levels choose one of these numbers, which have an offset of 128."""
        return None

    def fits(self, rows: int, columns: int) -> bool:
        return rows % ROWS == columns % PART == 0

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": ("uint8", (rows, row_bytes(self.bits, columns)))}

    def quantize(self, weight: Tensor) -> tuple[Tensor]:
        quantize = kernels.ops.rounding_blocks(weight)
        return kernels.ops.by_rows(lambda rows: (quantize(self.bits, rows),), weight, ROWS)

    def adopt(self, codes: TheirCodes) -> tuple[Tensor] | None:
        """The very numbers of GGUF's type of these blocks."""
        found = kernels.blocks_reference.adopted(self.bits, codes)
        return None if found is None else (found,)

    def widen(self, weight: Tensor) -> Tensor:
        reference = kernels.blocks_reference
        return reference.widen(self.bits, reference.unpack(self.bits, weight), self.table)

    def on_cpu(self, x: Tensor, weight: Tensor) -> Tensor:
        ops = kernels.ops
        if library := ops.library_for(x):
            multiply = partial(library.linear_blocks, self.bits, table=self.table)
            widen = partial(library.widen_blocks, self.bits, table=self.table)
            return ops.rounded(multiply, widen, x, weight)
        return super().on_cpu(x, weight)


class Blocks4(Blocks):
    """The numbers of GGUF's Q4_K with scales and zeros of 8 bits, 4.63 bits each in all."""

    bits, name, operator, is_coarse = 4, "int4", "linear_blocks4", True
    calibrates = True

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        reference = kernels.blocks_reference
        scale, zero = reference.scales_of(self.bits, reference.unpack(self.bits, weight))
        return scale, zero + 2 ** (self.bits - 1) * scale  # levels are held from 0 on

    def with_levels(self, levels: Tensor, weight: Tensor) -> tuple[Tensor]:
        reference = kernels.blocks_reference
        codes = reference.unpack(self.bits, weight)
        return (reference.pack(self.bits, codes._replace(levels=levels)),)


class Blocks6(Blocks):
    """The numbers of GGUF's Q6_K, 6.56 bits each."""

    bits, name, operator, is_coarse = 6, "int6", "linear_blocks6", True


class Blocks8(Blocks):
    """The numbers of GGUF's Q8_0, 8.5 bits each."""

    bits, name, operator = 8, "int8", "linear_blocks8"


BLOCKS4, BLOCKS6, BLOCKS8 = Blocks4(), Blocks6(), Blocks8()
