"""The text decoder: Llama 3 self-attention layers with gated cross-attention layers among them.

Text lies flat: N positions of any number of rows, one behind the other. Which of them attend to
what is the matter of what a layer is given: nn.kv_cache for the text before, and `Seen` for
pictures. Cross-attention needs no mask: a position sees all valid tiles of its group of pictures
and nothing else, and nothing in a group is causal. Positions before the first picture skip the
layer: it is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmchat.models.mllama.config import TextConfig
from mmchat.nn.attention import KeyValue, Row, attend, attend_rows, split_heads
from mmchat.nn.decoder import SelfAttentionLayer
from mmchat.nn.kv_cache import Past
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import GatedMLP
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import RotaryEmbedding


class Seen(Protocol):
    """What a cross-attention layer reads of the pictures, and for which of the N positions."""

    def take(self, x: Tensor) -> Tensor:
        """The positions that the layer computes. [N, E] -> [M, E]"""
        ...

    def attend(self, query: Tensor) -> Tensor:
        """query: [M, H, D] -> [M, H·D]"""
        ...

    def put(self, x: Tensor, read: Tensor) -> Tensor:
        """x [N, E], with the layer's output [M, E] at the positions that see a picture."""
        ...


class SeenRows:
    """Positions of rows of any lengths, each stretch with its own pictures.

    stretches: each with `count` of the taken positions. index: [M], those positions; None: all N.
    """

    def __init__(self, stretches: Sequence[Row], index: Tensor | None) -> None:
        self.stretches = stretches
        self.index = index

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.index]

    def attend(self, query: Tensor) -> Tensor:
        return attend_rows(query, self.stretches).flatten(1)

    def put(self, x: Tensor, read: Tensor) -> Tensor:
        return read if self.index is None else x.index_copy(0, self.index, read)


class SeenSteps(NamedTuple):
    """R rows that read S positions each, as tensors: all are computed.

    key, value: [R, G, M, D], of the last group of pictures of each row. mask: [R, 1, 1 or S, M],
    None if all rows see M tokens. sees: [R, 1 or S, 1], which see a picture; None if all do.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    sees: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        return x

    def attend(self, query: Tensor) -> Tensor:
        query = query.unflatten(0, (self.key.shape[0], -1)).transpose(1, 2)
        read = attend(query, self.key, self.value, mask=self.mask)
        return read.transpose(1, 2).flatten(2).flatten(0, 1)

    def put(self, x: Tensor, read: Tensor) -> Tensor:
        if self.sees is None:
            return read
        x, read = (y.unflatten(0, (self.key.shape[0], -1)) for y in (x, read))
        return torch.where(self.sees, read, x).flatten(0, 1)


class CrossAttention(nn.Module):
    """Attention from text to vision tokens, without positions; query and key heads are normalised.

    x: [M, E] -> [M, E].
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

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        query = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        return self.o_proj(seen.attend(query))


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

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        read = seen.take(x)
        attended = self.cross_attn(self.input_layernorm(read), seen)
        read = read + self.cross_attn_attn_gate.tanh() * attended
        branch = self.mlp(self.post_attention_layernorm(read))
        return seen.put(x, read + self.cross_attn_mlp_gate.tanh() * branch)


class TextModel(nn.Module):
    """Token embedding, the decoder layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
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
        token_ids: Tensor,
        positions: Tensor,
        past: Sequence[Past],
        seen: Sequence[Seen],
    ) -> Tensor:
        """token_ids, positions: [N] -> normalised hidden states [N, E].

        past: one for each self-attention layer. seen: one for each cross-attention layer; without
        any these layers are skipped.
        """
        x = self.embed_tokens(token_ids)
        cos, sin = self.rotary(positions)
        own, cross = iter(past), iter(seen)
        for layer in self.layers:
            if isinstance(layer, SelfAttentionLayer):
                x = layer(x, cos, sin, next(own))
            elif seen:
                x = layer(x, next(cross))
        return self.norm(x)
