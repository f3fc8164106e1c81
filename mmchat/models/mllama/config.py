"""Configuration of Mllama (Llama 3.2 Vision). Field names are those of the Hub's config.json.

No field of the architecture has a default: every value comes from a file. Height before width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mmchat.errors import quoted
from mmchat.models.family import Heads, TextSizes
from mmchat.models.mllama.tiling import supported_aspect_ratios
from mmchat.models.sections import EPS, OF_PICTURES, OF_TEXT, OF_VISION, check_decoder
from mmchat.strict_json import Where, check_divides, parse_dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling; lengths in positions."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Resized:
    """A vocabulary that tokens were added to: ids at and beyond the rows of the head can be read
    and never written."""

    embedding_rows: int
    image_token_id: int


@dataclass(frozen=True)
class VisionConfig:
    """The tiled vision encoder: `num_hidden_layers` local layers, then gated global ones."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    num_channels: int
    image_size: int  # side of one tile, pixels
    patch_size: int
    max_num_tiles: int
    intermediate_layers_indices: tuple[int, ...]
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.attention_heads

    @property
    def tokens_per_tile(self) -> int:
        """Patches and the class token (P); without the pad tokens."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def pad_tokens_per_tile(self) -> int:
        """Zero tokens that bring a tile to a multiple of 8; never 0, since g*g + 1 is none."""
        return -self.tokens_per_tile % 8

    @property
    def output_dim(self) -> int:
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @cached_property
    def aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """Supported canvases (tiles_h, tiles_w); the aspect ratio id of entry i is i + 1."""
        return supported_aspect_ratios(self.max_num_tiles)


# Rows of a released embedding beyond the vocabulary; row 0 of them is the image token.
EXTRA_EMBEDDING_ROWS = 8


@dataclass(frozen=True)
class TextConfig(Heads):
    """The decoder: Llama 3 self-attention layers with cross-attention layers among them."""

    vocab_size: int  # rows of the head; as released, the image token has this id
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # self- and cross-attention layers together
    num_attention_heads: int
    num_key_value_heads: int
    cross_attention_layers: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    resized: Resized | None = None

    @property
    def embedding_rows(self) -> int:
        return (
            self.resized.embedding_rows if self.resized else self.vocab_size + EXTRA_EMBEDDING_ROWS
        )

    @property
    def self_attention_layers(self) -> tuple[int, ...]:
        cross = set(self.cross_attention_layers)
        return tuple(i for i in range(self.num_hidden_layers) if i not in cross)


@dataclass(frozen=True)
class ImageProcessorConfig:
    """Normalisation per channel (red, green, blue) on the scale 0..1, and the rule for alpha.

    alpha: "white" composites transparent pictures over white, as the Hub's processor does; "drop"
    ignores the alpha channel, as Meta's does; "checkpoint" does as the makers of the checkpoint's
    format do. The rule acts when the picture is opened.
    """

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    alpha: Literal["checkpoint", "white", "drop"]


@dataclass(frozen=True)
class MllamaConfig(TextSizes):
    """Configuration of one Mllama model: vision, text, and how pictures are prepared."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_processor: ImageProcessorConfig

    @property
    def image_token_id(self) -> int:
        text = self.text_config
        return text.resized.image_token_id if text.resized else text.vocab_size

    @property
    def readable_tokens(self) -> int:
        """Token ids that a prompt may hold."""
        text = self.text_config
        return text.embedding_rows if text.resized else text.vocab_size


_BOUNDS = {
    VisionConfig: {
        **OF_VISION,
        "num_global_layers": (0, 256),
        "attention_heads": (1, 512),
        "max_num_tiles": (1, 16),
        "intermediate_layers_indices": (0, 255),
        "norm_eps": EPS,
    },
    TextConfig: {**OF_TEXT, "num_hidden_layers": (2, 256), "cross_attention_layers": (0, 255)},
    Resized: {"embedding_rows": (257, 600_000), "image_token_id": (0, 599_999)},
    RopeScaling: {
        "factor": (1.0, 1e4),
        "low_freq_factor": (1e-3, 1e3),
        "high_freq_factor": (1e-3, 1e3),
        "original_max_position_embeddings": (16, 2**24),
    },
    ImageProcessorConfig: OF_PICTURES,
}


def parse(sections: Mapping[str, Any], where: Where) -> MllamaConfig:
    """The family's sections of one of our params files; ParamsError names the key."""
    config = parse_dataclass(MllamaConfig, sections, where, _BOUNDS)
    vision, of_vision = config.vision_config, where.child("vision_config")
    check_divides(vision, "attention_heads", "hidden_size", of_vision)
    check_divides(vision, "patch_size", "image_size", of_vision)
    _check_layers(vision, "intermediate_layers_indices", of_vision)
    _check_text(config.text_config, where.child("text_config"))
    return config


def _check_text(config: TextConfig, where: Where) -> None:
    check_decoder(config, where)
    _check_layers(config, "cross_attention_layers", where)
    if len(config.cross_attention_layers) == config.num_hidden_layers:
        raise where.child("cross_attention_layers").fail("leaves no self-attention layer")
    resized = config.resized
    if resized and not resized.image_token_id < resized.embedding_rows >= config.vocab_size:
        raise where.child("resized").fail("the image token or the head lies beyond the embedding")
    scaling = config.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise where.child("rope_scaling").fail("low_freq_factor must be below high_freq_factor")


def _check_layers(config: VisionConfig | TextConfig, key: str, where: Where) -> None:
    indices, layers = getattr(config, key), config.num_hidden_layers
    if not indices or list(indices) != sorted(set(indices)) or indices[-1] >= layers:
        raise where.child(key).fail(
            f"expected rising layer numbers from 0 to {layers - 1}, found {quoted(list(indices))}"
        )
