"""What the kernels compute, in plain PyTorch: their oracle, and the last resort."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.quant.kernels.layout import SCALE_BYTES

LEVELS = 15  # int4 holds 0..15
LEAST_STEP = torch.finfo(torch.float32).tiny  # a smaller one has no finite inverse
RANGES, NARROWER, REFITS = 8, 0.05, 3  # as in quantize.c
WIDE_BYTES = 16 * 1024**2  # of keys and values that are widened at a time


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> int8 [N, K] and float32 scale [N]; the largest of a row becomes ±127.

    A row that holds NaN or infinity has it as its scale.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    scale = largest / 127
    inverse = torch.where(scale >= LEAST_STEP, 127 / largest, 0)
    return (wide * inverse[:, None]).nan_to_num(nan=0).round().to(torch.int8), scale


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> uint8 [N, K/2], bfloat16 scale and zero [N, K/group].

    Tries narrower and narrower ranges of each group, fits scale and zero to the levels by least
    squares, and keeps the range with the smallest squared error. Plain rounding is the first try.
    """
    rows = weight.shape[0]
    groups = weight.float().reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    kept = _fit(groups, low, (high - low) / LEVELS)
    for attempt in range(1, RANGES + REFITS):
        if attempt < RANGES:
            cut = attempt * NARROWER * (high - low) / 2
            tried = _fit(groups, low + cut, (high - low - 2 * cut) / LEVELS)
        else:
            step = kept[1].float()
            tried = _fit(groups, kept[2].float() - 8 * step, step)
        better = tried[3] < kept[3]
        kept = tuple(torch.where(better, new, old) for new, old in zip(tried, kept, strict=True))
    levels, scale, zero, _ = kept
    pairs = levels.to(torch.uint8).reshape(rows, -1, 2)
    packed = pairs[..., 0] | pairs[..., 1] << 4
    return packed, scale.reshape(rows, -1), zero.reshape(rows, -1)


def _fit(groups: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels [n, group], then scale, zero and squared error [n, 1] of groups: [n, group]."""
    inverse = torch.where(step >= LEAST_STEP, 1 / step, 0)
    levels = ((groups - low) * inverse).nan_to_num(nan=0).clamp(0, LEVELS).round()
    centred = levels - 8
    mean_q, mean_w = centred.mean(1, keepdim=True), groups.mean(1, keepdim=True)
    spread = (centred - mean_q).square().sum(1, keepdim=True)
    together = ((centred - mean_q) * groups).sum(1, keepdim=True)
    scale = torch.where(spread > 0, together / spread, step).bfloat16()
    zero = (mean_w - scale.float() * mean_q).bfloat16()
    error = groups - centred * scale.float() - zero.float()
    return levels, scale, zero, error.square().sum(1, keepdim=True)


def widen_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that int8 values stand for: [N, K] in `dtype`."""
    return (weight.float() * scale[:, None]).to(dtype)


def widen_int4(
    weight: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights that int4 values stand for: [N, K] in `dtype`."""
    levels = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).float() - 8
    grouped = levels.unflatten(1, (scale.shape[1], -1))
    return (grouped * scale.float()[..., None] + zero.float()[..., None]).flatten(1).to(dtype)


def pack_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """uint8 [N, K/2], bfloat16 [N, K/group] twice -> uint8 [N, K/2 + 4 K/group].

    Of every 8 rows, which N is a multiple of: for each group 8 scales, 8 zeros, and for each 8 of
    its columns 4 bytes of each row.
    """
    panels, groups = weight.shape[0] // 8, scale.shape[1]
    shared = torch.stack((scale, zero)).unflatten(1, (panels, 8)).permute(1, 3, 0, 2)
    shared = shared.contiguous().view(torch.uint8).flatten(2)  # [panels, groups, 32]
    levels = weight.reshape(panels, 8, groups, -1, 4).permute(0, 2, 3, 1, 4).flatten(2)
    return torch.cat((shared, levels), dim=-1).reshape(weight.shape[0], -1)


def unpack_int4(packed: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, scale and zero, of which pack_int4 makes `packed`."""
    rows = packed.shape[0]
    blocks = packed.reshape(rows // 8, -1, 32 + 4 * group)  # of the groups of 8 rows
    shared = blocks[..., :32].contiguous().view(torch.bfloat16).unflatten(-1, (2, 8))
    scale, zero = shared.permute(2, 0, 3, 1).flatten(1, 2).contiguous()
    levels = blocks[..., 32:].unflatten(-1, (-1, 8, 4)).permute(0, 3, 1, 2, 4)
    return levels.reshape(rows, -1), scale, zero


def round_rows(x: Tensor) -> Tensor:
    """Keys or values [..., D] in int8, behind each its float32 scale: int8 [..., D + 4]."""
    q, scale = quantize_int8(x.detach().reshape(-1, x.shape[-1]))
    return torch.cat((q, scale[:, None].view(torch.int8)), -1).reshape(*x.shape[:-1], -1)


def widen_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What round_rows has rounded: [..., D] in `dtype`."""
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES] * scale).to(dtype)


def by_heads(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """attend(query, key, value) of keys and values in int8, which are widened for it.

    On the CPU some heads at a time, as many as stay in the cache.
    """
    groups, per_group, heads = key.shape[1], query.shape[1] // key.shape[1], key.shape[1]
    if key.device.type == "cpu" and not torch.compiler.is_compiling():  # for any length
        heads = max(1, WIDE_BYTES * groups // (4 * (key.numel() + value.numel())))
    parts = []
    for first in range(0, groups, heads):
        wide = (widen_rows(x[:, first : first + heads], query.dtype) for x in (key, value))
        parts.append(attend(query[:, first * per_group : (first + heads) * per_group], *wide))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def attend_many(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Tensor:
    """query [B, H, S, D], key, value [B, G, N, D] -> [B, H, S, D].

    mask: [B or 1, 1, 1, N], boolean (True = may attend) or added to the scores. causal: the last
    query sees all keys, each one before it one less.
    """
    if causal:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
            key.shape[2] - query.shape[2]
        )
        mask = seen if mask is None else mask & seen
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the next token: query [B, H, 1, D], key, value [B, G, N, D] -> [B, H, 1, D].

    key, value: or as round_rows gives them. mask: [B or 1, 1, 1, N], True where it may attend.
    """
    if key.dtype == torch.int8:
        return by_heads(lambda q, k, v: attend(q, k, v, mask), query, key, value)
    batch, groups, _, width = key.shape
    folded = query.reshape(batch, groups, -1, width)  # the heads of a group read a key once
    return F.scaled_dot_product_attention(folded, key, value, attn_mask=mask).reshape(query.shape)
