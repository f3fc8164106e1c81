"""The Qwen-VL sections of a params file: JSON to QwenVLConfig, with ranges, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import isqrt
from typing import Any

from mmchat.models.qwen_vl.config import (
    HEAD_DIM,
    ImageProcessorConfig,
    QwenVLConfig,
    TextConfig,
    VisionConfig,
)
from mmchat.strict_json import Where, check_divides, check_keys, parse_dataclass

SECTIONS = ("vision_config", "text_config", "image_processor")

_BOUNDS = {
    VisionConfig: {
        "width": (8, 32_768),
        "layers": (1, 256),
        "heads": (1, 512),
        "mlp_ratio": (0.01, 64.0),
        "image_size": (8, 2_240),
        "patch_size": (2, 256),
        "n_queries": (1, 16_384),
    },
    TextConfig: {
        "vocab_size": (257, 300_000),
        "hidden_size": (8, 32_768),
        "intermediate_size": (8, 131_072),
        "num_hidden_layers": (1, 256),
        "num_attention_heads": (1, 512),
        "layer_norm_epsilon": (1e-12, 1e-2),
        "rotary_emb_base": (1.0, 1e9),
        "seq_length": (16, 2**24),
        "max_position_embeddings": (16, 2**24),
    },
    ImageProcessorConfig: {"image_mean": (0.0, 1.0), "image_std": (1e-3, 1.0)},
}


def parse(sections: Mapping[str, Any], where: Where) -> QwenVLConfig:
    """The family's sections of one of our params files; ParamsError names the key."""
    check_keys(sections, SECTIONS, (), where)
    kinds = (VisionConfig, TextConfig, ImageProcessorConfig)
    parts: list[Any] = [
        parse_dataclass(kind, sections[key], where.child(key), _BOUNDS)
        for key, kind in zip(SECTIONS, kinds, strict=True)
    ]
    config = QwenVLConfig(*parts)
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


def to_sections(config: QwenVLConfig) -> dict[str, Any]:
    """The JSON that `parse` reads."""
    return asdict(config)
