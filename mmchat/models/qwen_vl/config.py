"""Configuration of Qwen-VL. Field names are those of the Hub's config.json.

No field of the architecture has a default: every value comes from a file. Height before width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmchat.models.family import Heads, TextSizes

HEAD_DIM = 128  # of the resampler, in every model


@dataclass(frozen=True)
class VisionConfig:
    """The picture encoder, a ViT without a class token, and the resampler behind it."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float
    image_size: int  # side of the square picture, pixels
    patch_size: int
    n_queries: int  # embeddings a picture becomes; also the rows of its tables of positions

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def intermediate_size(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig(Heads):
    """The decoder, Qwen-7B.

    intermediate_size: of the gated MLP; the Hub's is twice as much. seq_length: positions that it
    was trained with, beyond which use_dynamic_ntk stretches the rotation and use_logn_attn sharpens
    attention.
    """

    vocab_size: int  # rows of the embedding and of the head
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_epsilon: float
    rotary_emb_base: float
    seq_length: int
    max_position_embeddings: int
    use_dynamic_ntk: bool
    use_logn_attn: bool

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    def alpha(self, prompt: int) -> int:
        """How far the rotation of a prompt of so many positions, and its answer, is stretched."""
        if not self.use_dynamic_ntk or prompt <= self.seq_length:
            return 1
        return 2 ** math.ceil(math.log2(prompt / self.seq_length) + 1) - 1

    def rotary_base(self, alpha: int) -> float:
        return self.rotary_emb_base * alpha ** (self.head_dim / (self.head_dim - 2))


@dataclass(frozen=True)
class ImageProcessorConfig:
    """Normalisation per channel (red, green, blue) on the scale 0..1.

    alpha: what becomes of transparent pixels when a picture is opened.
    """

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    alpha: Literal["white", "drop"]


@dataclass(frozen=True)
class QwenVLConfig(TextSizes):
    """Configuration of one Qwen-VL: vision, text, and how pictures are prepared."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_processor: ImageProcessorConfig
