"""The LLaVA sections of a params file: JSON to LlavaConfig, with ranges, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.models.llava.config import (
    FeaturesConfig,
    ImageProcessorConfig,
    LlavaConfig,
    TextConfig,
    VisionConfig,
)
from mmchat.models.llava.towers import TOWERS
from mmchat.strict_json import Where, check_divides, check_keys, parse_dataclass, quoted

SECTIONS = ("vision_config", "text_config", "features", "image_processor")

_EPS = (1e-12, 1e-2)
_BOUNDS = {
    VisionConfig: {
        "hidden_size": (8, 32_768),
        "intermediate_size": (8, 131_072),
        "num_hidden_layers": (1, 256),
        "num_attention_heads": (1, 512),
        "num_channels": (3, 3),
        "image_size": (8, 2_240),
        "patch_size": (2, 256),
        "layer_norm_eps": _EPS,
    },
    TextConfig: {
        "vocab_size": (260, 300_000),
        "hidden_size": (8, 32_768),
        "intermediate_size": (8, 131_072),
        "num_hidden_layers": (1, 256),
        "num_attention_heads": (1, 512),
        "num_key_value_heads": (1, 512),
        "rms_norm_eps": _EPS,
        "rope_theta": (1.0, 1e9),
        "max_position_embeddings": (16, 2**24),
    },
    FeaturesConfig: {"layer": (-256, 256)},
    ImageProcessorConfig: {"image_mean": (0.0, 1.0), "image_std": (1e-3, 1.0)},
}


def parse(sections: Mapping[str, Any], where: Where) -> LlavaConfig:
    """The family's sections of one of our params files; ParamsError names the key."""
    check_keys(sections, SECTIONS, (), where)
    kinds = (VisionConfig, TextConfig, FeaturesConfig, ImageProcessorConfig)
    parts: list[Any] = [
        parse_dataclass(kind, sections[key], where.child(key), _BOUNDS)
        for key, kind in zip(SECTIONS, kinds, strict=True)
    ]
    config = LlavaConfig(*parts)
    _check_heads(config.vision_config, where.child("vision_config"))
    _check_heads(config.text_config, where.child("text_config"))
    check_divides(config.vision_config, "patch_size", "image_size", where.child("vision_config"))
    check_divides(
        config.text_config, "num_key_value_heads", "num_attention_heads", where.child("text_config")
    )
    if config.text_config.head_dim % 2:
        raise (
            where.child("text_config")
            .child("num_attention_heads")
            .fail(
                f"{config.text_config.head_dim} dimensions per head; rotary positions need an even"
                " number"
            )
        )
    layers = config.vision_config.num_hidden_layers
    if not 0 <= config.vision_layers_used <= layers:
        raise (
            where.child("features")
            .child("layer")
            .fail(
                f"{config.features.layer} is not one of the {layers} layers of the vision encoder"
            )
        )
    tower = config.features.tower
    if tower is not None and tower not in TOWERS:
        known = ", ".join(map(quoted, TOWERS))
        raise where.child("features").child("tower").fail(f"{quoted(tower)} is not one of {known}")
    return config


def to_sections(config: LlavaConfig) -> dict[str, Any]:
    """The JSON that `parse` reads."""
    return asdict(config)


def _check_heads(config: VisionConfig | TextConfig, where: Where) -> None:
    check_divides(config, "num_attention_heads", "hidden_size", where)
