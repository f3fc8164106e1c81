"""Configuration of LLaVA-1.5. Field names are those of the Hub's config.json.

No field of the architecture has a default: every value comes from a file. Height before width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmchat.errors import quoted
from mmchat.models.family import Heads, TextSizes
from mmchat.models.sections import EPS, OF_PICTURES, OF_TEXT, OF_VISION, check_decoder
from mmchat.strict_json import Where, check_divides, parse_dataclass


@dataclass(frozen=True)
class VisionConfig(Heads):
    """The picture encoder: a CLIP ViT."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int  # side of the square picture, pixels
    patch_size: int
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig(Heads):
    """The decoder: Llama 2 without scaled positions."""

    vocab_size: int  # rows of the embedding and of the head
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How a picture becomes a normalised square; per channel on the scale 0..1.

    square: "pad" puts it on a square of the mean colour, as in the training of LLaVA-1.5; "crop"
    takes the middle of it. alpha: what becomes of transparent pixels when it is opened.
    """

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    square: Literal["pad", "crop"]
    alpha: Literal["white", "drop"]


@dataclass(frozen=True)
class FeaturesConfig:
    """Which of the encoder's states the text is given.

    layer: 0 is its embedding, i the output of layer i; from the end where negative, without the
    norm that follows. strategy: "default" leaves out the class token, "full" keeps it. tower: the
    repository of the encoder's weights where they are not with the others.
    """

    layer: int
    strategy: Literal["default", "full"]
    tower: str | None


@dataclass(frozen=True)
class LlavaConfig(TextSizes):
    """Configuration of one LLaVA: vision, text, what joins them, and how pictures are prepared."""

    vision_config: VisionConfig
    text_config: TextConfig
    features: FeaturesConfig
    image_processor: ImageProcessorConfig

    @property
    def image_token_id(self) -> int:
        """Marks a picture's positions; the embedding has no row for it, and no text gives it."""
        return self.text_config.vocab_size

    @property
    def positions_per_image(self) -> int:
        return self.vision_config.num_patches + (self.features.strategy == "full")

    @property
    def vision_layers_used(self) -> int:
        """How many layers of the encoder come before the features; the rest is not loaded."""
        layer = self.features.layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer


_BOUNDS = {
    VisionConfig: {**OF_VISION, "layer_norm_eps": EPS},
    TextConfig: {**OF_TEXT, "vocab_size": (260, 300_000)},
    FeaturesConfig: {"layer": (-256, 256)},
    ImageProcessorConfig: OF_PICTURES,
}


def parse(sections: Mapping[str, Any], where: Where) -> LlavaConfig:
    """The family's sections of one of our params files; ParamsError names the key."""
    config = parse_dataclass(LlavaConfig, sections, where, _BOUNDS)
    vision, features = config.vision_config, config.features
    of_vision, of_features = where.child("vision_config"), where.child("features")
    check_divides(vision, "num_attention_heads", "hidden_size", of_vision)
    check_divides(vision, "patch_size", "image_size", of_vision)
    check_decoder(config.text_config, where.child("text_config"))
    if not 0 <= config.vision_layers_used <= vision.num_hidden_layers:
        raise of_features.child("layer").fail(
            f"{features.layer} is not one of the {vision.num_hidden_layers} layers of the vision"
            " encoder"
        )
    if features.tower is not None and features.tower not in TOWERS:
        known = ", ".join(map(quoted, TOWERS))
        raise of_features.child("tower").fail(f"{quoted(features.tower)} is not one of {known}")
    return config


_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}
# Repository -> VisionConfig of it.
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": _LARGE | {"image_size": 224},
}


def known_tower(name: str) -> str | None:
    """The repository that a checkpoint means by `name`; None if it is none of the known."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return next((repo for repo in TOWERS if repo.rpartition("/")[2] == last), None)
