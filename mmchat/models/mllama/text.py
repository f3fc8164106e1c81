"""The text decoder: Llama 3 self-attention layers with gated cross-attention layers among them.

Cross-attention needs no mask. A position sees all valid tiles of its group of pictures and nothing
else, and nothing in a group is causal, so the caller splits the text into segments, each with the
keys and values of its group. Positions before the first picture skip the layer: it is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmchat.models.mllama.config import EXTRA_EMBEDDING_ROWS, TextConfig
from mmchat.nn.attention import attend, merge_heads, split_heads
from mmchat.nn.kv_cache import LayerCache
from mmchat.nn.linear import Linear, fuse
from mmchat.nn.mlp import GatedMLP
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import RotaryEmbedding, rotate

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CrossSegment:
    """Positions start..end of the batch rows `rows`, which see the same number of vision tokens.

    images: for each row, the indices of the pictures that it sees.
    """

    rows: tuple[int, ...]
    start: int
    end: int
    images: tuple[tuple[int, ...], ...]


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions. x: [B, S, E] -> [B, S, E]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.sizes = (config.hidden_size, key_size, key_size)
        self.qkv_proj: nn.Module | None = None

    def fuse_projections(self) -> None:
        """Read query, key and value in one product; their own layers go."""
        fuse(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj")

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key heads, and value heads: [B, H, S, D], [B, G, S, D] twice."""
        if self.qkv_proj is None:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            query, key, value = self.qkv_proj(x).split(self.sizes, dim=-1)
        query = rotate(split_heads(query, self.head_dim), cos, sin)
        key = rotate(split_heads(key, self.head_dim), cos, sin)
        return query, key, split_heads(value, self.head_dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, start: int
    ) -> Tensor:
        """Attend from positions start .. start + S to those before them and each other."""
        query, key, value = self.project(x, cos, sin)
        if cache is not None:
            cache.write_span(start, key, value)
        if start == 0 or cache is None:
            return self.o_proj(merge_heads(attend(query, key, value, causal=True)))
        end = start + x.shape[1]
        columns = torch.arange(end, device=x.device)
        mask = columns <= columns[start:, None]  # [S, end]
        key, value = cache.key[:, :, :end], cache.value[:, :, :end]
        return self.o_proj(merge_heads(attend(query, key, value, mask=mask[None, None])))

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, cached: KeyValue, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """The next tokens of each row, x: [B, S, E]; keys and values go to positions: [B, S].

        cached: [B, G, L, D] twice. mask: [B, 1, S, N], True up to and including the position; the
        first N positions are read.
        """
        query, key, value = self.project(x, cos, sin)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        cached[0][rows, :, positions] = key.transpose(1, 2)
        cached[1][rows, :, positions] = value.transpose(1, 2)
        key, value = (stored[:, :, : mask.shape[-1]] for stored in cached)
        return self.o_proj(merge_heads(attend(query, key, value, mask=mask)))


class CrossAttention(nn.Module):
    """Attention from text to vision tokens, without positions; query and key heads are normalised.

    x: [B, S, E], key, value: [B, G, N, D] -> [B, S, E].
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def key_value(self, states: Tensor) -> KeyValue:
        """Keys and values of vision tokens, states: [I, N, E] -> [I, G, N, D] twice."""
        key = self.k_norm(split_heads(self.k_proj(states), self.head_dim))
        return key, split_heads(self.v_proj(states), self.head_dim)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.q_norm(split_heads(self.q_proj(x), self.head_dim))
        return self.o_proj(merge_heads(attend(query, key, value, mask=mask)))


class SelfAttentionLayer(nn.Module):
    """A Llama 3 block: pre-norm self-attention, then a gated MLP."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Add the gated MLP. x: [B, S, E] -> [B, S, E]."""
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, start: int
    ) -> Tensor:
        return self.mlp_branch(x + self.self_attn(self.input_layernorm(x), cos, sin, cache, start))

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, cached: KeyValue, positions: Tensor, mask: Tensor
    ) -> Tensor:
        attended = self.self_attn.step(self.input_layernorm(x), cos, sin, cached, positions, mask)
        return self.mlp_branch(x + attended)


class CrossAttentionLayer(nn.Module):
    """A block that reads pictures: both branches are scaled by tanh of a learned gate [1]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        attended = self.cross_attn(self.input_layernorm(x), key, value, mask)
        x = x + self.cross_attn_attn_gate.tanh() * attended
        return x + self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))

    def step(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sees_images: Tensor | None,
    ) -> Tensor:
        """The next tokens of each row; rows that see no picture pass. As in TextModel.step."""
        read = self(x, key, value, mask)
        return read if sees_images is None else torch.where(sees_images, read, x)

    def forward_segments(
        self, x: Tensor, segments: Sequence[CrossSegment], images: Sequence[KeyValue]
    ) -> Tensor:
        """Run the block on the segments of x: [B, S, E] and leave all other positions alone.

        images: for each picture its keys and values [G, N, D].
        """
        out = x
        for segment in segments:
            key, value = gather_images(segment.images, images)
            rows = list(segment.rows)
            if len(rows) == x.shape[0] and segment.start == 0 and segment.end == x.shape[1]:
                return self(x, key, value)
            if out is x:
                out = x.clone()
            part = x[rows, segment.start : segment.end]
            out[rows, segment.start : segment.end] = self(part, key, value)
        return out


def gather_images(wanted: Sequence[Sequence[int]], images: Sequence[KeyValue]) -> KeyValue:
    """Keys and values of each row's pictures, one after the other: [rows, G, N, D] twice."""
    rows = []
    for which in (0, 1):
        parts = [
            images[indices[0]][which]
            if len(indices) == 1
            else torch.cat([images[i][which] for i in indices], dim=1)
            for indices in wanted
        ]
        rows.append(parts[0][None] if len(parts) == 1 else torch.stack(parts))
    return rows[0], rows[1]


class TextModel(nn.Module):
    """Token embedding, the decoder layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.vocab_size + EXTRA_EMBEDDING_ROWS
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        cross = set(config.cross_attention_layers)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(config) if i in cross else SelfAttentionLayer(config)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        scaling = config.rope_scaling
        self.rotary = RotaryEmbedding(
            config.head_dim, config.rope_theta, vars(scaling) if scaling else None
        )

    def forward(
        self,
        input_ids: Tensor,
        segments: Sequence[CrossSegment],
        images: Sequence[Sequence[KeyValue]],
        caches: Sequence[LayerCache] | None = None,
        start: int = 0,
    ) -> Tensor:
        """input_ids: [B, S] at positions start .. start + S -> normalised hidden states [B, S, E].

        images[j][i]: keys and values of picture i for the j-th cross-attention layer.
        caches: one for each self-attention layer; they are read up to `start` and written.
        """
        x = self.embed_tokens(input_ids)
        positions = torch.arange(start, start + input_ids.shape[1], device=x.device)[None]
        cos, sin = self.rotary(positions)
        cross = own = 0
        for layer in self.layers:
            if isinstance(layer, CrossAttentionLayer):
                if segments:
                    x = layer.forward_segments(x, segments, images[cross])
                cross += 1
            else:
                x = layer(x, cos, sin, caches[own] if caches else None, start)
                own += 1
        return self.norm(x)

    def step(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cached: Sequence[KeyValue],
        cross: Sequence[KeyValue] | None,
        cross_mask: Tensor | None,
        sees_images: Tensor | None,
        length: int | None = None,
    ) -> Tensor:
        """The next tokens of each row, input_ids: [B, S] -> normalised hidden states [B, S, E].

        positions: [B], where each row goes on. S is 1 in decoding, a few in verifying a draft.
        cached: self-attention keys and values [B, G, L, D], one pair a layer, written in place.
        cross: keys and values [B, G, N, D] of the last group of pictures, one pair for each
        cross-attention layer; None skips those layers. cross_mask: [B, 1, 1 or S, N], None if all
        rows see N tokens. sees_images: [B, 1 or S, 1], None if all do. length: how many positions
        of the cache hold a row once these are written, all if None.
        """
        x = self.embed_tokens(input_ids)
        positions = positions[:, None] + torch.arange(input_ids.shape[1], device=x.device)
        cos, sin = self.rotary(positions)
        columns = torch.arange(length or cached[0][0].shape[2], device=x.device)
        mask = (columns <= positions[..., None])[:, None]
        crossed = own = 0
        for layer in self.layers:
            if isinstance(layer, SelfAttentionLayer):
                x = layer.step(x, cos, sin, cached[own], positions, mask)
                own += 1
            elif isinstance(layer, CrossAttentionLayer) and cross is not None:
                x = layer.step(x, *cross[crossed], cross_mask, sees_images)
                crossed += 1
        return self.norm(x)


class LanguageModel(nn.Module):
    """The text model and its output head, which has no row for the image token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
