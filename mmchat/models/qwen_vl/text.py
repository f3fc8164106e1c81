"""The text decoder, Qwen-7B: what stands at a position, a token or a part of a picture, is given as
its embedding, and pictures are read as tokens are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmchat.models.qwen_vl.config import TextConfig
from mmchat.nn.kv_cache import Past
from mmchat.nn.linear import Linear, fuse
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import rotate, turns


class Attention(nn.Module):
    """Causal attention with rotary positions. x: [N, E] -> [N, E].

    sharpness: [N, 1, 1], what queries are multiplied by once they are rotated.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.c_attn = Linear(size, 3 * size)  # queries, then keys, then values
        self.c_proj = Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sharpness: Tensor, past: Past) -> Tensor:
        projected = self.c_attn(x).chunk(3, dim=-1)
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        query = rotate(query, cos, sin) * sharpness.to(query.dtype)
        return self.c_proj(past.attend(query, rotate(key, cos, sin), value))


class MLP(nn.Module):
    """c_proj(w1(x) · silu(w2(x))), without biases. x: [..., E] -> [..., E]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w2 = Linear(size, inner, bias=False), Linear(size, inner, bias=False)
        self.c_proj = Linear(inner, size, bias=False)
        self.w12: nn.Module | None = None

    def fuse_projections(self) -> None:
        """Read both in one product; `w1` and `w2` go."""
        fuse(self, ("w1", "w2"), "w12")

    def forward(self, x: Tensor) -> Tensor:
        if self.w12 is None:
            up, gate = self.w1(x), self.w2(x)
        else:
            up, gate = self.w12(x).chunk(2, dim=-1)
        return self.c_proj(up * F.silu(gate))


class DecoderLayer(nn.Module):
    """Pre-norm attention, then the MLP. x: [N, E] -> [N, E]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln_1, self.attn = RMSNorm(size, eps), Attention(config)
        self.ln_2, self.mlp = RMSNorm(size, eps), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sharpness: Tensor, past: Past) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin, sharpness, past)
        return x + self.mlp(self.ln_2(x))


class TextModel(nn.Module):
    """Token embedding, the decoder layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self, x: Tensor, positions: Tensor, past: Sequence[Past], inv_freq: Tensor
    ) -> Tensor:
        """x: [N, E] at positions [N] -> normalised hidden states [N, E].

        past: one a layer. inv_freq: [N, D/2], with which the prompt that the token is of is
        rotated.
        """
        turned = self.turned(positions, inv_freq)
        for layer, of_layer in zip(self.h, past, strict=True):
            x = layer(x, *turned, of_layer)
        return self.ln_f(x)

    def turned(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a layer is given of positions [N]: cosines, sines and sharpness."""
        return *turns(positions, inv_freq), self.sharpness(positions)

    def sharpness(self, positions: Tensor) -> Tensor:
        """log(p + 1) to the base of the trained length behind it, else 1: [N] -> [N, 1, 1]."""
        if not self.config.use_logn_attn:
            return positions.new_ones(len(positions), 1, 1).float()
        logs = (positions + 1).float().log() / math.log(self.config.seq_length)
        return logs.clamp(min=1)[:, None, None]
