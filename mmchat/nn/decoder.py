"""The decoder layer of Llama, which several families have, and what their text is named by."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmchat.nn.kv_cache import Past
from mmchat.nn.linear import Linear, fuse
from mmchat.nn.mlp import GatedMLP
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import rotate


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, without biases. x: [N, E] -> [N, E].

    config: its sizes, by the names of the Hub's LlamaConfig.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden_size, self.head_dim = config.hidden_size, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden_size, query_size, bias=False)
        self.k_proj = Linear(hidden_size, key_size, bias=False)
        self.v_proj = Linear(hidden_size, key_size, bias=False)
        self.o_proj = Linear(query_size, hidden_size, bias=False)
        self.sizes = (query_size, key_size, key_size)
        self.qkv_proj: nn.Module | None = None

    def fuse_projections(self) -> None:
        """Read query, key and value in one product; their own layers go."""
        fuse(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past) -> Tensor:
        if self.qkv_proj is None:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            query, key, value = self.qkv_proj(x).split(self.sizes, dim=-1)
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in (query, key, value))
        attended = past.attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o_proj(attended)


class SelfAttentionLayer(nn.Module):
    """A Llama block: pre-norm self-attention, then a gated MLP. x: [N, E] -> [N, E]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(size, config.intermediate_size)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """A text model and its output head, which has no row for the mark of a picture.

    model: of the family, with its own layers. config: as in SelfAttention.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model = model
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
