"""The Hub's config.json to our configuration, and back to the documents of a Hub folder.

Keys that do not matter here are passed over, missing ones take the defaults of their makers, and
what this model cannot do is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from mmchat.errors import quoted
from mmchat.models.hub_config import (
    check_preprocessor,
    folder_documents,
    levels_of,
    preprocessor_document,
    refuse_other,
    value_or,
    with_defaults,
)
from mmchat.models.mllama.config import MllamaConfig, parse
from mmchat.models.mllama.prompt import stop_ids
from mmchat.models.mllama.tensor_names import hub_name
from mmchat.strict_json import Where, as_object
from mmchat.tokenizers.base import Tokenizer

# Defaults of transformers' MllamaVisionConfig and MllamaTextConfig: a saved config.json may leave
# out every key that equals its default.
HF_VISION: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "norm_eps": 1e-5,
}
_HF_TEXT: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
}
_BILINEAR = 2  # Pillow's number
ROPE_THETA = 500_000.0
LLAMA3_SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def from_hf_config(
    found: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    where: Where,
    preprocessor_where: Where | None = None,
) -> MllamaConfig:
    """Translate the Hub's config.json (both spellings of RoPE) and preprocessor_config.json."""
    vision_where, text_where = where.child("vision_config"), where.child("text_config")
    vision = as_object(found.get("vision_config", {}), vision_where)
    text = as_object(found.get("text_config", {}), text_where)
    refuse_other(vision, {"hidden_act": "gelu"}, vision_where)
    refuse_other(text, {"hidden_act": "silu", "tie_word_embeddings": False}, text_where)
    if "num_attention_heads" in vision:
        vision = {"attention_heads": vision["num_attention_heads"], **vision}
    sections = {
        "vision_config": with_defaults(vision, HF_VISION),
        "text_config": with_defaults(text, _HF_TEXT)
        | _hf_rope(text, text_where)
        | {"resized": _resized(found, text, where)},
        "image_processor": {**levels_of(preprocessor), "alpha": "checkpoint"},
    }
    config = parse(sections, where)
    sizes = config.vision_config
    expected = {
        "supported_aspect_ratios": list(map(list, sizes.aspect_ratios)),
        "vision_output_dim": sizes.output_dim,
    }
    refuse_other(vision, expected, vision_where)
    prepared = {
        "do_pad": True,
        "max_image_tiles": sizes.max_num_tiles,
        "size": {"height": sizes.image_size, "width": sizes.image_size},
        "resample": _BILINEAR,
    }
    pictures = preprocessor_where or Where("preprocessor_config.json")
    check_preprocessor(preprocessor or {}, prepared, pictures)
    return config


def _resized(
    found: Mapping[str, Any], text: Mapping[str, Any], where: Where
) -> dict[str, Any] | None:
    """Tokens were added where the image token does not follow the vocabulary.

    transformers then counts the rows of the embedding, and not those of the head, which its older
    versions leave as they were: `fitted` tells them.
    """
    rows = value_or(text, "vocab_size", _HF_TEXT["vocab_size"])
    key = "image_token_index" if found.get("image_token_index") is not None else "image_token_id"
    image = value_or(found, key, rows)
    if image == rows:
        return None
    if type(image) is not int or type(rows) is not int or not 0 <= image < rows:
        raise where.child(key).fail(f"{quoted(image)} is no row of an embedding of {quoted(rows)}")
    return {"embedding_rows": rows, "image_token_id": image}


def fitted(config: MllamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> MllamaConfig:
    """A config with added tokens, with the rows that the embedding and the head have."""
    text, rows = config.text_config, {}
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] == text.hidden_size:  # not packed
            rows[hub_name(name)] = shape[0]
    resized = text.resized
    head = rows.get("language_model.lm_head.weight", text.vocab_size)
    embedding = rows.get("language_model.model.embed_tokens.weight", text.embedding_rows)
    if resized is None or not resized.image_token_id < embedding >= head:
        return config  # the check of the shapes says what is wrong
    resized = replace(resized, embedding_rows=embedding)
    return replace(config, text_config=replace(text, vocab_size=head, resized=resized))


def _hf_rope(text: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """rope_theta and rope_scaling from the spelling of transformers 4 or 5."""
    key = "rope_parameters" if text.get("rope_parameters") is not None else "rope_scaling"
    rope = as_object(value_or(text, key, {}), where.child(key))
    theta = value_or(rope, "rope_theta", value_or(text, "rope_theta", ROPE_THETA))
    kind = value_or(rope, "rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise where.child(key).fail(f"rope_type {quoted(kind)} is not supported, only 'llama3'")
    scaling = (
        {name: value_or(rope, name, None) for name in LLAMA3_SCALING} if kind == "llama3" else None
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


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
    side = vision.image_size
    pictures = preprocessor_document(
        "MllamaImageProcessor",
        config.image_processor,
        max_image_tiles=vision.max_num_tiles,
        resample=2,
        size={"height": side, "width": side},
    )
    return folder_documents(model, generation, token_ids, pictures)
