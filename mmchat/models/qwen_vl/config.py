"""Configuration of Qwen-VL. Field names are those of the Hub's config.json.

No field of the architecture has a default: every value comes from a file. Height before width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from mmchat.models.family import Heads, TextSizes
from mmchat.models.prompt import MediaFacts
from mmchat.models.sections import EPS, OF_PICTURES, OF_TEXT, OF_VISION
from mmchat.strict_json import Where, check_divides, parse_dataclass
from mmchat.words import pixels

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


_BOUNDS = {
    VisionConfig: {
        **OF_VISION,
        "width": (8, 32_768),
        "layers": (1, 256),
        "heads": (1, 512),
        "mlp_ratio": (0.01, 64.0),
        "n_queries": (1, 16_384),
    },
    TextConfig: {
        **OF_TEXT,
        "layer_norm_epsilon": EPS,
        "rotary_emb_base": (1.0, 1e9),
        "seq_length": (16, 2**24),
    },
    ImageProcessorConfig: OF_PICTURES,
}


def parse(sections: Mapping[str, Any], where: Where) -> QwenVLConfig:
    """The family's sections of one of our params files; ParamsError names the key."""
    config = parse_dataclass(QwenVLConfig, sections, where, _BOUNDS)
    vision, text = config.vision_config, config.text_config
    of_vision, of_text = where.child("vision_config"), where.child("text_config")
    check_divides(vision, "heads", "width", of_vision)
    check_divides(vision, "patch_size", "image_size", of_vision)
    check_divides(text, "num_attention_heads", "hidden_size", of_text)
    if isqrt(vision.n_queries) ** 2 != vision.n_queries:
        raise of_vision.child("n_queries").fail(f"{vision.n_queries} are no square of positions")
    if text.hidden_size % HEAD_DIM or text.head_dim % 2 or text.head_dim < 4:
        raise of_text.child("hidden_size").fail(
            f"{text.hidden_size:,} is no multiple of {HEAD_DIM}, or {text.head_dim} dimensions per"
            " head are odd or fewer than 4"
        )
    if text.hidden_size == vision.width:
        raise of_vision.child("width").fail(
            f"{vision.width:,}, as that of the text: the projection between them is missing then"
        )
    return config


def facts(config: QwenVLConfig, height: int, width: int) -> MediaFacts:
    """What people are told about a picture of `height` x `width` pixels."""
    vision = config.vision_config
    side, count = vision.image_size, vision.n_queries
    stretched = max(height, width) / min(height, width)
    return MediaFacts(
        size=(height, width),
        resized=(side, side),
        grid=(1, 1),
        tokens=count,
        positions=count + 2,  # with its two tags
        placed=f"resized to {pixels((side, side))}, whatever its shape",
        cut=f"{count + 2:,} positions",
        lines=(
            ("square", f"{pixels((side, side))}, the whole picture"),
            ("in the square", f"stretched: its sides were {stretched:.2f} to 1"),
        ),
        details={"square": [side, side], "fit": "stretch", "patch_size": vision.patch_size,
                 "positions": count + 2},
    )  # fmt: skip
