"""The configuration in JSON as the Hub has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.models.hub_config import preprocessor_document
from mmchat.models.llava.config import LlavaConfig
from mmchat.tokenizers.base import Tokenizer


def hub_documents(
    config: LlavaConfig,
    tokenizer: Tokenizer,
    *,
    is_chat: bool,  # noqa: ARG001  # all of them do
    dtype: str,
    generation: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """File name -> content of the JSON files of a folder of the Hub.

    The mark of a picture is the first id behind the tokenizer's; the embedding needs a row for it
    in transformers, as the Hub's conversions have one.
    """
    vision, text = config.vision_config, config.text_config
    mark = min(tokenizer.vocab_size, text.vocab_size - 1)
    side = vision.image_size
    ends = {
        "bos_token_id": tokenizer.special_id("<s>"),
        "eos_token_id": tokenizer.special_id("</s>"),
    }
    model = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "image_token_index": mark,
        "image_seq_length": config.positions_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": config.features.layer,
        "vision_feature_select_strategy": config.features.strategy,
        "vision_config": {
            **asdict(vision),
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
        },
        "text_config": {
            **asdict(text),
            **ends,
            "model_type": "llama",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
    }
    pictures = preprocessor_document(
        "LlavaImageProcessor",
        config.image_processor,
        do_pad=config.image_processor.square == "pad",
        do_center_crop=True,
        resample=3,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )
    answers = {**generation, "do_sample": generation["temperature"] > 0, **ends}
    return {
        "config.json": model,
        "generation_config.json": answers,
        "preprocessor_config.json": pictures,
    }
