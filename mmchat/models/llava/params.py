"""The LLaVA sections of a params file: JSON to LlavaConfig, with ranges, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmchat.errors import quoted
from mmchat.models.llava.config import (
    FeaturesConfig,
    ImageProcessorConfig,
    LlavaConfig,
    TextConfig,
    VisionConfig,
)
from mmchat.models.llava.towers import TOWERS
from mmchat.models.sections import EPS, OF_PICTURES, OF_TEXT, OF_VISION, check_decoder
from mmchat.strict_json import Where, check_divides, parse_dataclass

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
