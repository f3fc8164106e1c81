"""The text decoder, Llama 2: what stands at a position, a token or a part of a picture, is given
as its embedding, and pictures are read as tokens are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmchat.models.llava.config import TextConfig
from mmchat.nn.decoder import SelfAttentionLayer
from mmchat.nn.kv_cache import Past
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import RotaryEmbedding


class TextModel(nn.Module):
    """Token embedding, the decoder layers and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SelfAttentionLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, None)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] -> [N, E]; at the positions of pictures, whose ids have no row, any row."""
        return self.embed_tokens(token_ids.clamp(max=self.embed_tokens.num_embeddings - 1))

    def forward(self, x: Tensor, positions: Tensor, past: Sequence[Past]) -> Tensor:
        """x: [N, E] at positions [N] -> normalised hidden states [N, E]. past: one a layer."""
        cos, sin = self.rotary(positions)
        for layer, of_layer in zip(self.layers, past, strict=True):
            x = layer(x, cos, sin, of_layer)
        return self.norm(x)
