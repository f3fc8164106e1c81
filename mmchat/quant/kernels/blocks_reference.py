"""Weights in blocks, in plain PyTorch: their layout, how they are rounded, and what they stand for.

Columns are a multiple of 64, a part. Each group of 16 or 32 has a scale, which is itself of few
bits under d, and a zero under dz, float16 numbers of each block of 256 columns:

    bits  group  w                              scale    zero  holds the numbers of GGUF's
    4     32     (d · scale) · q + dz · zero    uint8    int8  Q4_K
    6     16     (d · scale) · (q - 32)         int8           Q6_K
    8     32     scale · (q - 128)              float16        Q8_0
    TABLE 64     scale · (table[q] - 128)       float32        (of bitsandbytes)

Those of a TABLE have 4 bits.
Eight rows are a panel, and lie as the kernel reads them (`pack`), so that weights are used where
they lie in a file, in one stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmchat.quant.kernels.layout import (
    GROUPS,
    LARGE,
    LARGES,
    PART,
    ROWS,
    TABLE,
    columns_of,
    part_bytes,
    row_bytes,
)

if TYPE_CHECKING:
    from mmchat.checkpoints.codes import Codes as TheirCodes

# With 4 bits: shares of the range that are cut from either end; then of the scale, and of it again,
# by which the best scale and zero are changed; codes to either side that are tried at last.
CUTS = (0.0, 0.05, 0.1)
SCALES = (-0.08, -0.055, -0.03, 0.0, 0.03, 0.055, 0.08)
ZEROS = (-0.45, -0.3, -0.15, 0.0, 0.15, 0.3, 0.45)
NEARER, FURTHER = (-0.02, 0.0, 0.02), (-0.1, 0.0, 0.1)  # likewise, once more
NEAR = 1
SIZES = 12  # scales that are tried, with 6 bits
TINY = torch.finfo(torch.float32).tiny  # a smaller step has no finite inverse
_SMALL = {4: torch.uint8, TABLE: torch.float32, 6: torch.int8, 8: torch.float16}
# Codes of our form: dtypes of levels and scales, whether there are zeros, numbers over each block.
_ADOPTED = {
    4: (torch.uint8, torch.uint8, True, 2),
    TABLE: (torch.uint8, torch.float32, False, False),
    6: (torch.int8, torch.int8, False, 1),
    8: (torch.int8, torch.float16, False, False),
}


class Codes(NamedTuple):
    """Weights [N, K] as whole numbers and what scales them.

    levels: uint8 [N, K]. small: of each group, uint8 [N, G, 2], scale and zero, int8, float16 or
    float32 [N, G, 1]. large: of each block, float16 [N, B, 2], d and dz, [N, B, 1] or [N, 1, 0].
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
    return _in_panels(bits, _row_levels(bits, codes.levels), codes.small, codes.large)


def _in_panels(bits: int, levels: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """levels: as _row_levels gives them; small, large: as of Codes."""
    rows, parts = levels.shape[:2]
    columns, head = parts * PART, 2 * LARGES[bits] * ROWS
    out = levels.new_empty(rows // ROWS, ROWS * row_bytes(bits, columns))
    small = small.reshape(rows // ROWS, ROWS, parts, -1, small.shape[-1]).permute(0, 2, 3, 4, 1)
    fours = levels.view(torch.int32).reshape(rows // ROWS, ROWS, parts, -1).permute(0, 2, 3, 1)
    large = large.reshape(rows // ROWS, ROWS, large.shape[1], -1).permute(0, 2, 3, 1)
    at = 0
    for block, count, each in _spans(bits, columns):
        size = head + each * ROWS * part_bytes(bits)
        here = out[:, at : at + count * size].unflatten(1, (count, size))
        here[..., :head] = _as_bytes(large[:, block : block + count], 2)
        inner = here[..., head:].unflatten(-1, (each, -1))
        begin = block * LARGE // PART
        some = slice(begin, begin + count * each)
        inner[..., : 4 * ROWS] = _as_bytes(small[:, some], 2).unflatten(1, (count, each))
        words = inner[..., 4 * ROWS :].view(torch.int32).unflatten(-1, (-1, ROWS))
        words.copy_(fours[:, some].unflatten(1, (count, each)))
        at += count * size
    return out.reshape(rows, -1)


def unpack(bits: int, packed: Tensor) -> Codes:
    """The codes of which `pack` makes `packed`."""
    rows, columns = len(packed), columns_of(bits, packed.shape[1])
    stream, at, found = packed.reshape(rows // ROWS, -1), 0, []
    head, per_small = 2 * LARGES[bits] * ROWS, _SMALL[bits]
    for _, count, parts in _spans(bits, columns):
        size = head + parts * ROWS * part_bytes(bits)
        here = stream[:, at : at + count * size].unflatten(1, (count, size))
        at += count * size
        each = here[..., head:].unflatten(-1, (parts, -1))
        large = _as_numbers(here[..., :head], torch.float16).unflatten(-1, (-1, ROWS))
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
    size = LARGE if LARGES[bits] else columns
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


def _row_levels(bits: int, levels: Tensor) -> Tensor:
    """[N, K] -> uint8 [N, K / 64, bytes], as a row has them.

    8 bits: a byte a column. 4 bits: two, the first in the low half. 6 bits: the low four so, and
    then the upper two: byte j of 16 columns has those of 2j, 2j + 1, 2j + 8 and 2j + 9.
    """
    parts = levels.unflatten(1, (-1, PART))
    if bits == 8:
        return parts
    two = parts.contiguous().view(torch.int16)  # columns
    pairs = (two & 15 | two >> 4 & 0xF0).to(torch.uint8)
    if bits != 6:
        return pairs
    upper = (two >> 4 & 3 | two >> 10 & 12).unflatten(-1, (4, 2, 4))
    upper = (upper[..., 0, :] | upper[..., 1, :] << 4).to(torch.uint8).flatten(-2)
    return torch.cat((pairs, upper), dim=-1)


def _unpack_levels(bits: int, packed: Tensor) -> Tensor:
    """uint8 [panels, blocks, parts, bytes] -> [panels, 8, blocks, parts, 64]."""
    fours = packed.unflatten(-1, (-1, ROWS, 4)).permute(0, 4, 1, 2, 3, 5)
    if bits == 8:
        return fours.flatten(-2)
    low = fours[..., :8, :]
    levels = torch.stack((low & 15, low >> 4), dim=-1).flatten(-3)
    if bits == 6:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
        upper = fours[..., 8:, :, None] >> shifts & 3
        levels = levels | upper.unflatten(-1, (2, 2)).transpose(-2, -3).flatten(-4) << 4
    return levels


def adopted(bits: int, codes: TheirCodes) -> Tensor | None:
    """The codes of another program as `pack` has them, where they are of this form."""
    levels, scale, zero, large = codes.levels, codes.scale, codes.zero, codes.large
    columns = levels.shape[1] * (2 if levels.dtype == torch.uint8 else 1)
    held = (levels.dtype, scale.dtype, zero is not None, large is not None and large.shape[2])
    if held != _ADOPTED[bits] or columns != scale.shape[1] * GROUPS[bits]:
        return None
    if levels.dtype == torch.uint8:
        rows = levels.unflatten(1, (-1, PART // 2)).contiguous()
    else:
        rows = _row_levels(bits, levels.view(torch.uint8) + _offset(bits))
    small = scale[..., None] if zero is None else torch.stack((scale, zero.view(torch.uint8)), -1)
    return _in_panels(bits, rows, small, small[:, :1, :0] if large is None else large)


# ---- values -------------------------------------------------------------------------------------


def scales_of(bits: int, codes: Codes) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, float32 [N, G]."""
    _, small, large = codes
    scale, groups = small[..., 0].float(), small.shape[1]
    shared = large.float().repeat_interleave(LARGE // GROUPS[bits], 1)[:, :groups]
    if bits == 4:
        d, dz = shared.unbind(-1)
        return d * scale, dz * small[..., 1].view(torch.int8).float()
    if bits == 6:
        scale = shared[..., 0] * scale
    return scale, torch.zeros_like(scale)


def widen(bits: int, codes: Codes, table: Tensor | None = None) -> Tensor:
    """What the codes stand for, float32 [N, K]. table: uint8 [16] of a TABLE."""
    scale, zero = scales_of(bits, codes)
    levels = codes.levels
    if bits == TABLE and table is not None:
        levels = table.to(levels.device)[levels.int()]
    groups = levels.unflatten(1, (scale.shape[1], -1)).float() - _offset(bits)
    return (groups * scale[..., None] + zero[..., None]).flatten(1)


def _offset(bits: int) -> int:
    return 0 if bits == 4 else 2 ** ((8 if bits == TABLE else bits) - 1)


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
    return _quantize4(groups)


def quantize_table(weight: Tensor, table: Tensor) -> Codes:
    """Round to the nearest of the 16 numbers, of which the largest is that of each group's size."""
    groups = weight.float().unflatten(1, (-1, GROUPS[TABLE]))
    numbers, order = (table.to(weight.device).float() - _offset(TABLE)).sort()
    scale = groups.abs().amax(-1, keepdim=True) / numbers.abs().amax()
    middles = (numbers[1:] + numbers[:-1]) / 2
    found = torch.bucketize(groups * torch.where(scale >= TINY, 1 / scale, 0), middles)
    return Codes(order[found].to(torch.uint8).flatten(1), scale, scale[:, :1, :0].half())


def _levels(groups: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """The nearest levels, without their offset: [..., group]; scale, zero: [..., 1]."""
    inverse = torch.where(scale.abs() >= TINY, 1 / scale, 0)
    most = 2 ** (bits - 1)
    return ((groups - zero) * inverse).nan_to_num(nan=0).clamp(-most, most - 1).round()


def _code(value: Tensor, step: Tensor) -> Tensor:
    return torch.where(step.abs() >= TINY, value / step, 0).nan_to_num(nan=0).round()


def _joined(bits: int, levels: Tensor, small: Tensor, large: Tensor) -> Codes:
    return Codes((levels + 2 ** (bits - 1)).to(torch.uint8).flatten(1), small, large)


def _half(value: Tensor, most: int = 127) -> Tensor:
    """value >= 0 as float16; the next larger one where it would be so small that `most` became one
    more."""
    near = value.half()
    too_small = near.float() * ((most + 0.5) / most) < value
    return (near.view(torch.int16) + too_small).view(torch.float16)


def _steps(bits: int, values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Steps of which `most` are the largest of the values [N, G] >= 0 of a block: float16 [N, B],
    and float32 [N, G]."""
    share = LARGE // GROUPS[bits]
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % share))
    large = _half(padded.unflatten(1, (-1, share)).amax(-1) / most, most)
    return large, large.float().repeat_interleave(share, 1)[:, : values.shape[1]]


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
    scale = kept[0][..., 0]
    large, step = _steps(6, scale.abs(), 127)
    small = _code(scale, step).clamp(-127, 127)
    levels = _levels(groups, (step * small)[..., None], 0.0, 6)
    return _joined(6, levels, small.to(torch.int8)[..., None], large[..., None])


def _better(kept: tuple[Tensor, ...], tried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of each group the one whose error, the last of a tuple, is less."""
    if not kept:
        return tried
    better = tried[-1] < kept[-1]
    return tuple(torch.where(better, new, old) for new, old in zip(tried, kept, strict=True))


def _quantize4(groups: Tensor) -> Codes:
    """Scale and middle, where a level is 8, of the smallest error over several ranges; then the
    codes of the smallest error near to these."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    kept: Any = ()
    for cut_low, cut_high in itertools.product(CUTS, CUTS):
        scale = (high - low) * (1 - cut_low - cut_high) / 15
        kept = _better(kept, _fit(groups, scale, low + cut_low * (high - low) + 8 * scale))
    for scales, zeros in ((SCALES, ZEROS), (NEARER, FURTHER)):
        scale, zero, _ = kept
        for more, further in itertools.product(scales, zeros):
            kept = _better(kept, _fit(groups, scale * (1 + more), zero + scale * further))
    scale, middle, _ = (found[..., 0] for found in kept)
    zero = middle - 8 * scale
    (d, step), (dz, step_zero) = _steps(4, scale, 255), _steps(4, zero.abs(), 127)
    first, first_zero = _code(scale, step), _code(zero, step_zero)
    kept = ()
    for away, away_zero in itertools.product(range(-NEAR, NEAR + 1), range(-NEAR, NEAR + 1)):
        code = (first + away).clamp(0, 255)[..., None]
        code_zero = (first_zero + away_zero).clamp(-127, 127)[..., None]
        scale = code * step[..., None]
        middle = code_zero * step_zero[..., None] + 8 * scale
        levels = _levels(groups, scale, middle, 4)
        error = (groups - levels * scale - middle).square().sum(-1, keepdim=True)
        kept = _better(kept, (code, code_zero, levels, error))
    code, code_zero, levels, _ = kept
    small = torch.cat((code.to(torch.uint8), code_zero.to(torch.int8).view(torch.uint8)), -1)
    return _joined(4, levels, small, torch.stack((d, dz), -1))


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
