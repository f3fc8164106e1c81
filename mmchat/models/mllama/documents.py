"""The configuration in JSON as the Hub has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.models.hub_config import preprocessor_document
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.prompt import stop_ids
from mmchat.tokenizers.base import Tokenizer


def hub_documents(
    config: MllamaConfig,
    tokenizer: Tokenizer,
    *,
    is_chat: bool,
    dtype: str,
    generation: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """File name -> content of config, generation_config and preprocessor_config."""
    stops = stop_ids(tokenizer) if is_chat else {tokenizer.special_id("<|end_of_text|>")}
    token_ids = {  # transformers' own defaults lie beyond a small vocabulary
        "bos_token_id": tokenizer.special_id("<|begin_of_text|>"),
        "eos_token_id": sorted(stops),
        "pad_token_id": tokenizer.special_id("<|finetune_right_pad_id|>"),
    }
    vision, text = config.vision_config, asdict(config.text_config)
    scaling = text.pop("rope_scaling")
    if text.pop("resized"):  # as transformers says it: the rows of the embedding
        text["vocab_size"] = config.text_config.embedding_rows
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
    pictures = preprocessor_document(
        "MllamaImageProcessor",
        config.image_processor,
        max_image_tiles=vision.max_num_tiles,
        resample=2,
        size={"height": side, "width": side},
    )
    return {
        "config.json": model,
        "generation_config.json": {**answers, **token_ids},
        "preprocessor_config.json": pictures,
    }
