"""The Qwen-VL sections of a params file: JSON to QwenVLConfig, with ranges, and back."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from mmchat.models.qwen_vl.config import (
    HEAD_DIM,
    ImageProcessorConfig,
    QwenVLConfig,
    TextConfig,
    VisionConfig,
)
from mmchat.models.sections import EPS, OF_PICTURES, OF_TEXT, OF_VISION
from mmchat.strict_json import Where, check_divides, parse_dataclass

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
