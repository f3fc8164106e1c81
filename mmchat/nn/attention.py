"""Scaled dot-product attention with grouped heads that are never expanded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmchat.quant.kernels import ops, reference

KeyValue = tuple[Tensor, Tensor]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H·D] -> [B, H, S, D]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H·D]."""
    return x.transpose(1, 2).flatten(-2)


def held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., D] as a cache of this dtype has them; in int8 [..., D + 4]."""
    return reference.round_rows(x) if dtype == torch.int8 else x


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(query·keyᵀ/√D + mask)·value for grouped-query attention.

    query: [B, H, S, D], key, value: [B, G, N, D] -> [B, H, S, D]; H is a multiple of G.
    key, value: or int8 [B, G, N, D + 4], as `held` gives them, through which no gradient goes.
    mask: [B or 1, 1, S or 1, N], boolean (True = may attend) or additive in query's dtype.
    causal: the last position attends to all keys, each before it to one less; needs no mask.

    The query heads of a group are folded into the position axis, so a key or value head is read
    once for all of them and never copied (Ainslie et al. 2023).
    """
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    boolean = mask is None or mask.dtype == torch.bool
    if length == 1 and not causal and boolean and _reads_fast(query, key, value):
        return ops.attend(query, key, value, mask)
    if key.dtype == torch.int8:
        widened = partial(attend, mask=mask, causal=causal)
        return reference.by_heads(widened, query, key, value)
    attended = ops.attend_many(query, key, value, mask, causal=causal)
    if attended is not None:
        return attended
    if causal and length != key.shape[2]:  # which torch would align at the first key
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        mask, causal = seen.tril(key.shape[2] - length)[None, None], False
    if causal:  # by torch: heads that are folded into positions are in no causal order
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads != groups
        )
    if heads == groups:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    per_group = heads // groups
    folded = query.reshape(batch, groups, per_group * length, dim)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(1, 1, per_group, 1)
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return attended.unflatten(2, (per_group, length)).flatten(1, 2)


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """What `attend` gives each key without a mask, the mean over the heads.

    query: [S, H, D], key: [G, N, D] or as `held` -> float32 [S, N]; each row sums to 1.
    """
    if key.dtype == torch.int8:
        key = reference.widen_rows(key)
    grouped = query.float().unflatten(1, (key.shape[0], -1))
    scores = torch.einsum("sgpd,gnd->gpsn", grouped, key.float()) * query.shape[-1] ** -0.5
    return scores.softmax(-1).mean((0, 1))


class Row(NamedTuple):
    """So many queries and what they attend to: key, value [1, G, n, D]."""

    queries: int
    key: Tensor
    value: Tensor
    is_causal: bool = False


def attend_rows(query: Tensor, rows: Sequence[Row]) -> Tensor:
    """Attention of rows that lie one behind the other, each to its own keys and values.

    query: [N, H, D] -> [N, H, D]. Nothing is padded, whatever the lengths are.
    """
    writing = list(takewhile(lambda row: row.queries == 1, rows))  # who does comes first
    reading = rows[len(writing) :]
    at, parts = len(writing), []
    if at > 1 and all(_reads_fast(query, row.key, row.value) for row in writing):
        keys, values = [row.key for row in writing], [row.value for row in writing]
        parts.append(ops.attend_rows(query[:at], keys, values))
    else:
        parts += _each(query[:at], writing)
    if len(reading) > 1 and _are_causal_of_one_length(reading):
        # new prompts, as in training: one product, for which their keys are copied
        key = torch.cat([row.key for row in reading])
        value = torch.cat([row.value for row in reading])
        together = query[at:].unflatten(0, (len(reading), -1)).transpose(1, 2)
        parts.append(attend(together, key, value, causal=True).transpose(1, 2).flatten(0, 1))
    else:
        parts += _each(query[at:], reading)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _each(query: Tensor, rows: Sequence[Row]) -> Iterator[Tensor]:
    parts = query.split([row.queries for row in rows])
    for part, (_, key, value, is_causal) in zip(parts, rows, strict=True):
        part = part.transpose(0, 1)[None]
        yield attend(part, key, value, causal=is_causal)[0].transpose(0, 1)


def _are_causal_of_one_length(rows: Sequence[Row]) -> bool:
    """Of prompts that are read from their beginning."""
    return all(row.is_causal and row.queries == row.key.shape[2] == rows[0].queries for row in rows)


def _reads_fast(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether one query is best read by the kernels for it, which give no gradient."""
    return ops.is_fast_for(key) and not ops.needs_gradient(query, key, value)
