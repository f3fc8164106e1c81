"""The Mllama sections of a params file: JSON to MllamaConfig, with ranges, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.errors import quoted
from mmchat.models.mllama.config import (
    ImageProcessorConfig,
    MllamaConfig,
    Resized,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from mmchat.strict_json import Where, check_divides, check_keys, parse_dataclass

SECTIONS = ("vision_config", "text_config", "image_processor")


_EPS = (1e-12, 1e-2)
_BOUNDS = {
    VisionConfig: {
        "hidden_size": (8, 32_768),
        "intermediate_size": (8, 131_072),
        "num_hidden_layers": (1, 256),
        "num_global_layers": (0, 256),
        "attention_heads": (1, 512),
        "num_channels": (3, 3),
        "image_size": (8, 2_240),
        "patch_size": (2, 256),
        "max_num_tiles": (1, 16),
        "intermediate_layers_indices": (0, 255),
        "norm_eps": _EPS,
    },
    TextConfig: {
        "vocab_size": (257, 300_000),
        "hidden_size": (8, 32_768),
        "intermediate_size": (8, 131_072),
        "num_hidden_layers": (2, 256),
        "num_attention_heads": (1, 512),
        "num_key_value_heads": (1, 512),
        "cross_attention_layers": (0, 255),
        "rms_norm_eps": _EPS,
        "rope_theta": (1.0, 1e9),
        "max_position_embeddings": (16, 2**24),
    },
    Resized: {"embedding_rows": (257, 600_000), "image_token_id": (0, 599_999)},
    RopeScaling: {
        "factor": (1.0, 1e4),
        "low_freq_factor": (1e-3, 1e3),
        "high_freq_factor": (1e-3, 1e3),
        "original_max_position_embeddings": (16, 2**24),
    },
    ImageProcessorConfig: {"image_mean": (0.0, 1.0), "image_std": (1e-3, 1.0)},
}


def parse(sections: Mapping[str, Any], where: Where) -> MllamaConfig:
    """The family's sections of one of our params files; ParamsError names the key."""
    check_keys(sections, SECTIONS, (), where)
    vision = parse_dataclass(
        VisionConfig, sections["vision_config"], where.child("vision_config"), _BOUNDS
    )
    text = parse_dataclass(TextConfig, sections["text_config"], where.child("text_config"), _BOUNDS)
    processor = parse_dataclass(
        ImageProcessorConfig, sections["image_processor"], where.child("image_processor"), _BOUNDS
    )
    _check_vision(vision, where.child("vision_config"))
    _check_text(text, where.child("text_config"))
    return MllamaConfig(vision, text, processor)


def to_sections(config: MllamaConfig) -> dict[str, Any]:
    """The JSON that `parse` reads."""
    return asdict(config)


def _check_vision(config: VisionConfig, where: Where) -> None:
    check_divides(config, "attention_heads", "hidden_size", where)
    check_divides(config, "patch_size", "image_size", where)
    _check_layers(config, "intermediate_layers_indices", where)


def _check_text(config: TextConfig, where: Where) -> None:
    check_divides(config, "num_attention_heads", "hidden_size", where)
    check_divides(config, "num_key_value_heads", "num_attention_heads", where)
    _check_layers(config, "cross_attention_layers", where)
    if config.head_dim % 2:
        raise where.child("num_attention_heads").fail(
            f"{config.head_dim} dimensions per head; rotary positions need an even number"
        )
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
