"""Weights in blocks, in plain PyTorch: their layout, how they are rounded, and what they stand for.

Columns are a multiple of 64, a part. Each group of 16 or 32 has a scale, which is itself of few
bits under that of a block, a row or 256 columns:

    bits  group  w                                    scale  zero  block
    4     32     (d · scale) · (q - 8) + dz · zero    uint8  int8  row, d and dz bfloat16
    6     16     (d · scale) · (q - 32)               int8         256, d float16 (GGUF's Q6_K)
    8     32     scale · (q - 128)                    float16      (GGUF's Q8_0)

Eight rows are a panel, and lie as the kernel reads them (`pack`), so that weights are used where
they lie in a file, in one stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmchat.quant.kernels.layout import BLOCK6, GROUPS, PART, ROWS, columns_of

# With 4 bits: shares of the range that are cut from either end; then of the scale, and of it again,
# by which the best scale and zero are changed; codes to either side that are tried at last.
CUTS = (0.0, 0.05, 0.1)
SCALES = (-0.08, -0.055, -0.03, 0.0, 0.03, 0.055, 0.08)
ZEROS = (-0.45, -0.3, -0.15, 0.0, 0.15, 0.3, 0.45)
NEARER, FURTHER = (-0.02, 0.0, 0.02), (-0.1, 0.0, 0.1)  # likewise, once more
NEAR = 1
SIZES = 12  # scales that are tried, with 6 bits
TINY = torch.finfo(torch.float32).tiny  # a smaller step has no finite inverse


class Codes(NamedTuple):
    """Weights [N, K] as whole numbers and what scales them.

    levels: uint8 [N, K]. small: of each group, uint8 [N, G, 2], scale and zero, int8 [N, G, 1] or
    float16 [N, G, 1]. large: of each block, bfloat16 [N, 1, 2], float16 [N, B, 1] or [N, 1, 0].
    """

    levels: Tensor
    small: Tensor
    large: Tensor


# ---- the order in memory ------------------------------------------------------------------------


def pack(bits: int, codes: Codes) -> Tensor:
    """uint8 [N, row_bytes]; N is a multiple of 8.

    A panel is its blocks one after the other: d [8] and dz [8] of the rows, and for each part the
    scale [8] and zero [8] of each group, then the levels, four bytes of each row in turn.
    """
    levels, small, large = codes
    rows, columns = levels.shape
    found = []
    for block, count, parts in _spans(bits, columns):
        shape = (rows // ROWS, ROWS, count, parts)
        width = count * parts * PART
        begin = block * BLOCK6
        groups = slice(begin // GROUPS[bits], (begin + width) // GROUPS[bits])
        some = large[:, block : block + count].reshape(*shape[:3], -1).permute(0, 2, 3, 1)
        scales = small[:, groups].reshape(*shape, -1, small.shape[-1]).permute(0, 2, 3, 4, 5, 1)
        here = _pack_levels(bits, levels[:, begin : begin + width].reshape(*shape, PART))
        both = torch.cat((_as_bytes(scales, 3), here), dim=-1).flatten(2)
        found.append(torch.cat((_as_bytes(some, 2), both), dim=-1).flatten(1))
    return torch.cat(found, dim=1).reshape(rows, -1)


def unpack(bits: int, packed: Tensor) -> Codes:
    """The codes of which `pack` makes `packed`."""
    rows, columns = len(packed), columns_of(bits, packed.shape[1])
    stream, at, found = packed.reshape(rows // ROWS, -1), 0, []
    head, per_large, per_small = {
        4: (4, torch.bfloat16, torch.uint8),
        6: (2, torch.float16, torch.int8),
        8: (0, torch.float16, torch.float16),
    }[bits]
    head *= ROWS
    for _, count, parts in _spans(bits, columns):
        size = head + parts * ROWS * (PART * bits // 8 + 4)
        here = stream[:, at : at + count * size].unflatten(1, (count, size))
        at += count * size
        each = here[..., head:].unflatten(-1, (parts, -1))
        large = _as_numbers(here[..., :head], per_large).unflatten(-1, (-1, ROWS))
        small = _as_numbers(each[..., : 4 * ROWS], per_small)
        small = small.unflatten(-1, (PART // GROUPS[bits], -1, ROWS)).permute(0, 5, 1, 2, 3, 4)
        found.append(
            (
                _unpack_levels(bits, each[..., 4 * ROWS :]).reshape(rows, -1),
                small.reshape(rows, -1, small.shape[-1]),
                large.permute(0, 3, 1, 2).reshape(rows, count, -1),
            )
        )
    return Codes(*(torch.cat(some, dim=1) for some in zip(*found, strict=True)))


def _spans(bits: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """First block, number of blocks and the parts of each: whole ones, then a shorter one."""
    size = BLOCK6 if bits == 6 else columns
    whole, rest = columns // size, columns % size // PART
    if whole:
        yield 0, whole, size // PART
    if rest:
        yield whole, 1, rest


def _as_bytes(numbers: Tensor, axes: int) -> Tensor:
    """The numbers behind the first so many axes, as bytes on one axis."""
    flat = numbers.flatten(axes).contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def _as_numbers(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.contiguous().view(dtype) if data.numel() else data.to(dtype)


def _pack_levels(bits: int, levels: Tensor) -> Tensor:
    """[panels, 8, blocks, parts, 64] -> uint8 [panels, blocks, parts, bytes].

    8 bits: a byte a column. 4 bits: two, the first in the low half. 6 bits: the low four so, and
    then the upper two: byte j of 16 columns has those of 2j, 2j + 1, 2j + 8 and 2j + 9.
    """
    if bits == 8:
        fours = levels.unflatten(-1, (16, 4))
    else:
        fours = (levels[..., ::2] & 15 | levels[..., 1::2] << 4).unflatten(-1, (8, 4))
    if bits == 6:
        upper = (levels >> 4).unflatten(-1, (4, 2, 4, 2)).transpose(-2, -3).flatten(-2)
        upper = (upper << _shifts(levels)).sum(-1, dtype=torch.uint8)
        fours = torch.cat((fours, upper), dim=-2)
    return fours.permute(0, 2, 3, 4, 1, 5).flatten(3)


def _unpack_levels(bits: int, packed: Tensor) -> Tensor:
    """uint8 [panels, blocks, parts, bytes] -> [panels, 8, blocks, parts, 64]."""
    fours = packed.unflatten(-1, (-1, ROWS, 4)).permute(0, 4, 1, 2, 3, 5)
    if bits == 8:
        return fours.flatten(-2)
    low = fours[..., :8, :]
    levels = torch.stack((low & 15, low >> 4), dim=-1).flatten(-3)
    if bits == 6:
        upper = fours[..., 8:, :, None] >> _shifts(packed) & 3
        levels = levels | upper.unflatten(-1, (2, 2)).transpose(-2, -3).flatten(-4) << 4
    return levels


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 8, 2, dtype=torch.uint8, device=like.device)


# ---- values -------------------------------------------------------------------------------------


def scales_of(bits: int, codes: Codes) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, float32 [N, G]."""
    _, small, large = codes
    scale, groups = small[..., 0].float(), small.shape[1]
    if bits == 4:
        d, dz = large.float().unbind(-1)
        return d * scale, dz * small[..., 1].view(torch.int8).float()
    if bits == 6:
        shared = large[..., 0].float().repeat_interleave(BLOCK6 // GROUPS[6], 1)
        scale = shared[:, :groups] * scale
    return scale, torch.zeros_like(scale)


def widen(bits: int, codes: Codes) -> Tensor:
    """What the codes stand for, float32 [N, K]."""
    scale, zero = scales_of(bits, codes)
    groups = codes.levels.unflatten(1, (scale.shape[1], -1)).float() - 2 ** (bits - 1)
    return (groups * scale[..., None] + zero[..., None]).flatten(1)


# ---- rounding -----------------------------------------------------------------------------------


def quantize(bits: int, weight: Tensor) -> Codes:
    """Round `weight` [N, K] with the smallest squared errors that were found.

    What shares a scale with NaN or infinity becomes NaN.
    """
    groups = weight.float().unflatten(1, (-1, GROUPS[bits]))
    if bits == 8:
        return _quantize8(groups)
    if bits == 6:
        return _quantize6(groups)
    return coded4(groups, *_fitted4(groups))


def _levels(groups: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """The nearest levels, without their offset: [..., group]; scale, zero: [..., 1]."""
    inverse = torch.where(scale.abs() >= TINY, 1 / scale, 0)
    most = 2 ** (bits - 1)
    return ((groups - zero) * inverse).nan_to_num(nan=0).clamp(-most, most - 1).round()


def _code(value: Tensor, step: Tensor) -> Tensor:
    return torch.where(step.abs() >= TINY, value / step, 0).nan_to_num(nan=0).round()


def _joined(bits: int, levels: Tensor, small: Tensor, large: Tensor) -> Codes:
    return Codes((levels + 2 ** (bits - 1)).to(torch.uint8).flatten(1), small, large)


def _half(value: Tensor) -> Tensor:
    """value >= 0 as float16; the next larger one where it would be so small that 127 became 128."""
    near = value.half()
    return (near.view(torch.int16) + (near.float() * (127.5 / 127) < value)).view(torch.float16)


def _quantize8(groups: Tensor) -> Codes:
    small = _half(groups.abs().amax(-1, keepdim=True) / 127)
    levels = _levels(groups, small.float(), 0.0, 8).clamp(min=-127)
    return _joined(8, levels, small, small[:, :1, :0])


def _quantize6(groups: Tensor) -> Codes:
    """The weight of the largest size in a group becomes -31 to -34 before it is cut, in SIZES
    steps; the scale is then fitted by least squares."""
    at = groups.abs().argmax(-1, keepdim=True)
    most = groups.gather(-1, at)
    kept: Any = ()
    for attempt in range(SIZES):
        level = _levels(groups, most / -(31 + attempt / 4), 0.0, 6)
        size = level.square().sum(-1, keepdim=True)
        scale = (level * groups).sum(-1, keepdim=True) / size.clamp(min=1)
        kept = _better(kept, (scale, (groups - level * scale).square().sum(-1, keepdim=True)))
    return _coded6(groups, kept[0][..., 0])


def _better(kept: tuple[Tensor, ...], tried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of each group the one whose error, the last of a tuple, is less."""
    if not kept:
        return tried
    better = tried[-1] < kept[-1]
    return tuple(torch.where(better, new, old) for new, old in zip(tried, kept, strict=True))


def _coded6(groups: Tensor, scale: Tensor) -> Codes:
    """scale: float32 [N, G]."""
    share = BLOCK6 // GROUPS[6]
    padded = torch.nn.functional.pad(scale.abs(), (0, -scale.shape[1] % share))
    large = _half(padded.unflatten(1, (-1, share)).amax(-1, keepdim=True) / 127)
    shared = large[..., 0].float().repeat_interleave(share, 1)[:, : scale.shape[1]]
    small = _code(scale, shared).clamp(-127, 127)
    levels = _levels(groups, (shared * small)[..., None], 0.0, 6)
    return _joined(6, levels, small.to(torch.int8)[..., None], large)


def _fitted4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, G] with the smallest error over several ranges."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    kept: Any = ()
    for cut_low, cut_high in itertools.product(CUTS, CUTS):
        scale = (high - low) * (1 - cut_low - cut_high) / 15
        kept = _better(kept, _fit(groups, scale, low + cut_low * (high - low) + 8 * scale))
    for scales, zeros in ((SCALES, ZEROS), (NEARER, FURTHER)):
        scale, zero, _ = kept
        for more, further in itertools.product(scales, zeros):
            kept = _better(kept, _fit(groups, scale * (1 + more), zero + scale * further))
    return kept[0][..., 0], kept[1][..., 0]


def _fit(groups: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero and squared error, all [N, G, 1], by least squares to the rounded levels."""
    level = _levels(groups, scale, zero, 4)
    mean, mean_w = level.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    spread = (level - mean).square().sum(-1, keepdim=True)
    together = ((level - mean) * groups).sum(-1, keepdim=True)
    scale = torch.where(spread > 0, together / spread, scale)
    zero = mean_w - scale * mean
    error = groups - level * scale - zero
    return scale, zero, error.square().sum(-1, keepdim=True)


def coded4(groups: Tensor, scale: Tensor, zero: Tensor) -> Codes:
    """4-bit codes with scales and zeros near to these [N, G], of the smallest error."""
    d = (scale.amax(1, keepdim=True) / 255).bfloat16()
    dz = (zero.abs().amax(1, keepdim=True) / 127).bfloat16()
    step, step_zero = d.float(), dz.float()
    first, first_zero = _code(scale, step), _code(zero, step_zero)
    kept: Any = ()
    for away, away_zero in itertools.product(range(-NEAR, NEAR + 1), range(-NEAR, NEAR + 1)):
        code = (first + away).clamp(0, 255)[..., None]
        code_zero = (first_zero + away_zero).clamp(-127, 127)[..., None]
        values = code * step[..., None], code_zero * step_zero[..., None]
        found = _levels(groups, *values, 4) * values[0] + values[1]
        error = (groups - found).square().sum(-1, keepdim=True)
        kept = _better(kept, (code, code_zero, error))
    code, code_zero, _ = kept
    levels = _levels(groups, code * step[..., None], code_zero * step_zero[..., None], 4)
    small = torch.cat((code.to(torch.uint8), code_zero.to(torch.int8).view(torch.uint8)), -1)
    return _joined(4, levels, small, torch.stack((d, dz), -1))
