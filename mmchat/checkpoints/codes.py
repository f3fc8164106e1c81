"""What other programs make of a weight: whole numbers, and what scales them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Rows [n, K] of a weight as whole numbers or float8; scale, zero: [n, G], of its groups.

    levels int8 or float8_e4m3fn: w = levels · scale. levels uint8, 0 to 15, two a byte [n, K/2],
    the first in the low half: w = (levels - 8) · scale + zero.

    large: float16 [n, B, 1 or 2], of larger blocks of columns, where scale and zero are whole
    numbers. Then w = levels · (large[0] · scale) + large[1] · zero.

    table: float32 [16]. Then w = table[levels] · scale.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor | None = None
    large: Tensor | None = None
    table: Tensor | None = None
