"""The number types of GGUF files: how their blocks lie, and the float32 numbers they stand for.

Products are made in float32 and in the order of the format's own programs, so that every number is
theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 2**18  # numbers that are widened together, so that what lies between stays in the cache


@dataclass(frozen=True)
class BlockType:
    """A type of blocks, each of `values` numbers in `bytes` bytes.

    widen: uint8 [blocks, bytes] -> float32 that reshapes to [blocks, values]. bits: of one number.
    """

    name: str
    values: int
    bytes: int
    widen: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.values


def widened(kind: BlockType, packed: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [rows, columns] of any float dtype from `packed`, uint8 [rows, bytes of a row]."""
    blocks, flat = packed.reshape(-1, kind.bytes), out.view(-1)
    step = _CHUNK // kind.values
    for begin in range(0, len(blocks), step):
        part = kind.widen(blocks[begin : begin + step])
        flat[begin * kind.values :][: part.numel()] = part.reshape(-1)
    return out


def _halves(blocks: Tensor, begin: int, count: int = 1) -> Tensor:
    """float16 numbers at byte `begin` of each block, as float32 [blocks, count]."""
    import torch

    return blocks[:, begin : begin + 2 * count].contiguous().view(torch.float16).float()


def _int8(data: Tensor) -> Tensor:
    import torch

    return data.view(torch.int8)


def _q8_0(blocks: Tensor) -> Tensor:
    return _int8(blocks[:, 2:]).float() * _halves(blocks, 0)


def _nibbles(data: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2, n]: all low halves, then all high ones."""
    import torch

    return torch.stack((data & 15, data >> 4), dim=-2)


def _q4_0(blocks: Tensor) -> Tensor:
    levels = _int8(_nibbles(blocks[:, 2:]).flatten(1)) - 8
    return levels.float() * _halves(blocks, 0)


def _q5_0(blocks: Tensor) -> Tensor:
    import torch

    shifts = torch.arange(8, dtype=torch.uint8)
    fifth = (blocks[:, 2:6, None] >> shifts & 1).flatten(1)
    levels = _int8(_nibbles(blocks[:, 6:]).flatten(1) | fifth << 4) - 16
    return levels.float() * _halves(blocks, 0)


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes of each block -> eight scales and eight minima of 6 bits, uint8 [blocks, 8]."""
    import torch

    first, second, both = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, both & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, both >> 4 | second >> 6 << 4), dim=1)
    return scales, minima


def _with_minima(blocks: Tensor, levels: Tensor) -> Tensor:
    """levels: [blocks, 8, 32]; of blocks that begin with d, dmin and 12 bytes of scales."""
    scales, minima = _six_bits(blocks[:, 4:16])
    halves = _halves(blocks, 0, 2)
    scale, least = halves[:, :1] * scales.float(), halves[:, 1:] * minima.float()
    return (levels.float() * scale[..., None]).sub_(least[..., None])


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    import torch

    levels = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    return _with_minima(blocks, levels | (blocks[:, None, 16:48] >> shifts & 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    import torch

    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(3, (2, 32)).flatten(2, 3)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3
    levels = _int8((low | high << 4).flatten(1)) - 32
    scales = _halves(blocks, 208) * _int8(blocks[:, 192:208]).float()
    return levels.unflatten(1, (16, 16)).float() * scales[..., None]


PACKED = {  # by their numbers in files
    2: BlockType("Q4_0", 32, 18, _q4_0),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
}
PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
# What else a file may hold, for messages.
OTHERS = {
    3: "Q4_1", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
