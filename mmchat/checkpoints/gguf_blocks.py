"""The number types of GGUF files: how their blocks lie, and the float32 numbers they stand for.

Products are made in float32 and in the order of the format's own programs, so that every number is
theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.checkpoints.codes import Codes

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 2**18  # numbers that are widened together, so that what lies between stays in the cache


@dataclass(frozen=True)
class BlockType:
    """A type of blocks, each of `values` numbers in `bytes` bytes.

    parts: uint8 [blocks, bytes] -> their codes, a row for each block.
    """

    name: str
    values: int
    bytes: int
    parts: Callable[[Tensor], Codes]

    def codes(self, packed: Tensor) -> Codes:
        """Those of whole rows, uint8 [rows, bytes of a row]."""
        rows, found = len(packed), self.parts(packed.reshape(-1, self.bytes))
        levels, scale = found.levels.reshape(rows, -1), found.scale.reshape(rows, -1)
        zero = None if found.zero is None else found.zero.reshape(rows, -1)
        large = None if found.large is None else found.large.reshape(rows, -1, found.large.shape[2])
        return Codes(levels, scale, zero, large)


def widened(kind: BlockType, packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The numbers in `packed`, uint8 [..., bytes of a row], as float32 of this shape."""
    import torch

    blocks, out = packed.reshape(-1, kind.bytes), torch.empty(shape)
    flat, step = out.view(-1), _CHUNK // kind.values
    for begin in range(0, len(blocks), step):
        part = _wide(kind.parts(blocks[begin : begin + step]))
        flat[begin * kind.values :][: part.numel()] = part.reshape(-1)
    return out


def _wide(codes: Codes) -> Tensor:
    """What a block in each row stands for, float32."""
    import torch

    levels, scale, large = codes.levels, codes.scale.float(), codes.large
    if levels.dtype == torch.uint8:
        levels = _int8(torch.stack((levels & 15, levels >> 4), dim=-1).flatten(1))
        levels = levels - 8 if large is None else levels
    if large is not None:
        scale = large[:, 0, :1].float() * scale
    wide = levels.float().unflatten(1, (scale.shape[1], -1)).mul_(scale[..., None])
    if large is not None and codes.zero is not None:
        wide.sub_((large[:, 0, 1:].float() * (-codes.zero).float())[..., None])
    return wide


def _halves(blocks: Tensor, begin: int, count: int = 1) -> Tensor:
    """float16 numbers at byte `begin` of each block [blocks, count]."""
    import torch

    return blocks[:, begin : begin + 2 * count].contiguous().view(torch.float16)


def _int8(data: Tensor) -> Tensor:
    import torch

    return data.view(torch.int8)


def _nibbles(data: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2, n]: all low halves, then all high ones."""
    import torch

    return torch.stack((data & 15, data >> 4), dim=-2)


def _paired(levels: Tensor) -> Tensor:
    """[..., n] -> [..., n/2], two neighbours a byte."""
    return levels[..., ::2] | levels[..., 1::2] << 4


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(_int8(blocks[:, 2:]), _halves(blocks, 0))


def _q4_0(blocks: Tensor) -> Codes:
    import torch

    scale = _halves(blocks, 0)
    levels = _nibbles(blocks[:, 2:]).flatten(1)
    return Codes(_paired(levels), scale, torch.zeros_like(scale))


def _q5_0(blocks: Tensor) -> Codes:
    import torch

    shifts = torch.arange(8, dtype=torch.uint8)
    fifth = (blocks[:, 2:6, None] >> shifts & 1).flatten(1)
    levels = _int8(_nibbles(blocks[:, 6:]).flatten(1) | fifth << 4) - 16
    return Codes(levels, _halves(blocks, 0))


def _with_minima(blocks: Tensor, levels: Tensor) -> Codes:
    """Of blocks that begin with d, dmin and 12 bytes of eight scales and minima of 6 bits."""
    import torch

    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, both & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, both >> 4 | second >> 6 << 4), dim=1)
    return Codes(levels, scales, -_int8(minima), _halves(blocks, 0, 2)[:, None])


def _q4_k(blocks: Tensor) -> Codes:
    import torch

    two = blocks[:, 16:].contiguous().view(torch.int16).unflatten(1, (4, 16))  # bytes
    pairs = torch.stack((two & 15 | two >> 4 & 0xF0, two >> 4 & 15 | two >> 8 & 0xF0), dim=2)
    return _with_minima(blocks, pairs.to(torch.uint8).flatten(1))


def _q5_k(blocks: Tensor) -> Codes:
    import torch

    levels = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    levels = levels | (blocks[:, None, 16:48] >> shifts & 1) << 4
    return _with_minima(blocks, _int8(levels.flatten(1)))


def _q6_k(blocks: Tensor) -> Codes:
    import torch

    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(3, (2, 32)).flatten(2, 3)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3
    levels = _int8((low | high << 4).flatten(1)) - 32
    return Codes(levels, _int8(blocks[:, 192:208]), large=_halves(blocks, 208)[:, None])


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
