"""The configuration in the words of others: the Hub's JSON files, Meta's params.json, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.params import ImageProcessorParams


def hf_documents(
    config: MllamaConfig,
    processor: ImageProcessorParams,
    dtype: str,
    generation: dict[str, float],
    token_ids: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """File name -> content of config, generation_config and preprocessor_config.

    token_ids: bos_token_id, eos_token_id and pad_token_id; transformers' own defaults lie beyond a
    small vocabulary.
    """
    vision, text = config.vision_config, asdict(config.text_config)
    scaling = text.pop("rope_scaling")
    rope = {"rope_type": "llama3", **scaling} if scaling else None
    model = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "vision_config": {
            **asdict(vision),
            "model_type": "mllama_vision_model",
            "supported_aspect_ratios": vision.aspect_ratios,
            "vision_output_dim": vision.output_dim,
        },
        "text_config": {
            **text,
            **token_ids,
            "model_type": "mllama_text_model",
            "rope_scaling": rope,
            "tie_word_embeddings": False,
        },
    }
    answers = {**generation, "do_sample": generation["temperature"] > 0}
    side = vision.image_size
    pictures = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "max_image_tiles": vision.max_num_tiles,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    return {
        "config.json": model,
        "generation_config.json": {**answers, **token_ids},
        "preprocessor_config.json": pictures,
    }


def meta_params(config: MllamaConfig) -> dict[str, Any]:
    """Meta's params.json; it cannot say everything, so read it back and compare."""
    text, vision = config.text_config, config.vision_config
    cross = len(text.cross_attention_layers)
    multiplier, multiple = _feed_forward(text.hidden_size, text.intermediate_size)
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers - cross,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "vision_chunk_size": vision.image_size,
        "vision_max_num_chunks": vision.max_num_tiles,
        "vision_num_cross_attention_layers": cross,
    }


def _feed_forward(width: int, inner: int) -> tuple[float, int]:
    """ffn_dim_multiplier and multiple_of that give `inner`; Meta's own where they do."""
    base = int(2 * (4 * width) / 3)
    for multiplier, multiple in ((1.3, 1024), (1.3, 4096), (1.0, 256)):
        if multiple * -(-int(multiplier * base) // multiple) == inner:
            return multiplier, multiple
    return (inner + 0.5) / base, 1


def sections(config: MllamaConfig, processor: ImageProcessorParams) -> dict[str, Any]:
    """The family's sections of one of our own params files."""
    return {
        "vision_config": asdict(config.vision_config),
        "text_config": asdict(config.text_config),
        "image_processor": asdict(processor),
    }
