"""Scaled dot-product attention with grouped heads that are never expanded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.quant.kernels import ops


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H·D] -> [B, H, S, D]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H·D]."""
    return x.transpose(1, 2).flatten(-2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(query·keyᵀ/√D + mask)·value for grouped-query attention.

    query: [B, H, S, D], key, value: [B, G, N, D] -> [B, H, S, D]; H is a multiple of G.
    mask: [B or 1, 1, S or 1, N], boolean (True = may attend) or additive in query's dtype.
    causal: position s attends to keys 0..s; needs S == N and no mask.

    The query heads of a group are folded into the position axis, so a key or value head is read
    once for all of them and never copied (Ainslie et al. 2023).
    """
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    if causal:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads != groups
        )
    boolean = mask is None or mask.dtype == torch.bool
    if length == 1 and boolean and key.dtype == torch.bfloat16 and key.device.type == "cpu":
        return ops.attend(query, key, value, mask)
    if heads == groups:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    per_group = heads // groups
    folded = query.reshape(batch, groups, per_group * length, dim)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(1, 1, per_group, 1)
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return attended.reshape(batch, heads, length, dim)
