"""The decoder layer of Llama, which several families have."""

from __future__ import annotations

from torch import Tensor, nn

from mmchat.nn.kv_cache import Past
from mmchat.nn.linear import Linear, fuse
from mmchat.nn.mlp import GatedMLP
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import rotate


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, without biases. x: [N, E] -> [N, E]."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        query_size, key_size = num_heads * head_dim, num_key_value_heads * head_dim
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

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(hidden_size, num_heads, num_key_value_heads, head_dim)
        self.mlp = GatedMLP(hidden_size, intermediate_size)
        self.input_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))
