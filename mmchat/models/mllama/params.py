"""The Mllama sections of a params file: JSON to MllamaConfig, with ranges, and back."""

from __future__ import annotations

from collections.abc import Mapping
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
from mmchat.models.sections import EPS, OF_PICTURES, OF_TEXT, OF_VISION, check_decoder
from mmchat.strict_json import Where, check_divides, parse_dataclass

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
