"""The configurations of others: the Hub's config.json and Meta's params.json, to ours.

Keys that do not matter here are passed over, missing ones take the defaults of their makers, and
what this model cannot do is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmchat.errors import quoted
from mmchat.models.family import Translated
from mmchat.models.hub_config import check_preprocessor, levels_of, refuse_other, value_or
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.params import parse
from mmchat.models.mllama.tensor_names import hub_name
from mmchat.strict_json import Where, as_object

# Defaults of transformers' MllamaVisionConfig and MllamaTextConfig: a saved config.json may leave
# out every key that equals its default.
_HF_VISION: dict[str, Any] = {
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
_ROPE_THETA = 500_000.0
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
        "vision_config": {
            key: value_or(vision, key, default) for key, default in _HF_VISION.items()
        },
        "text_config": {key: value_or(text, key, default) for key, default in _HF_TEXT.items()}
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
    theta = value_or(rope, "rope_theta", value_or(text, "rope_theta", _ROPE_THETA))
    kind = value_or(rope, "rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise where.child(key).fail(f"rope_type {quoted(kind)} is not supported, only 'llama3'")
    scaling = (
        {name: value_or(rope, name, None) for name in LLAMA3_SCALING} if kind == "llama3" else None
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def from_makers(
    found: Mapping[str, Any], folders: str, where: Where
) -> Translated[MllamaConfig] | None:
    """Translate Meta's params.json, which does not say whether the model chats; None for others."""
    if isinstance(nested := found.get("model"), dict) and "dim" in nested:
        found, where = nested, where.child("model")
    if "dim" not in found:
        return None
    config = from_meta_params(found, where)
    if "instruct" in folders or "guard" in folders:
        return Translated(config, is_chat=True)
    # Of the released models, only the 11B base model has tiles of 448 pixels.
    is_base = re.search(r"\d+b-vision", folders) or config.vision_config.image_size == 448
    return Translated(config, is_chat=False if is_base else None)


def from_meta_params(found: Mapping[str, Any], where: Where) -> MllamaConfig:
    """Translate the numbers of Meta's; the vision tower's sizes are fixed in Meta's code."""
    numbers = _MetaNumbers(found, where)
    width = numbers.integer("dim", 8, 32_768)
    self_layers = numbers.integer("n_layers", 1, 255)
    heads = numbers.integer("n_heads", 1, 512)
    cross = _meta_cross_layers(self_layers, numbers.cross_attention_layers(self_layers), where)
    scaled = found.get("use_scaled_rope", False) is True
    text = {
        "vocab_size": numbers.integer("vocab_size", 257, 300_000),
        "hidden_size": width,
        "intermediate_size": numbers.feed_forward_width(width),
        "num_hidden_layers": self_layers + len(cross),
        "num_attention_heads": heads,
        "num_key_value_heads": numbers.integer("n_kv_heads", 1, 512, default=heads),
        "cross_attention_layers": cross,
        "rms_norm_eps": value_or(found, "norm_eps", 1e-5),
        "rope_theta": value_or(found, "rope_theta", _ROPE_THETA),
        "rope_scaling": dict(LLAMA3_SCALING) if scaled else None,
        "max_position_embeddings": 131_072,
    }
    vision = dict(
        _HF_VISION,
        image_size=numbers.integer("vision_chunk_size", 8, 2_240),
        max_num_tiles=numbers.integer("vision_max_num_chunks", 1, 16, default=4),
    )
    processor = {**levels_of(), "alpha": "checkpoint"}
    sections = {"vision_config": vision, "text_config": text, "image_processor": processor}
    return parse(sections, where)


@dataclass(frozen=True)
class _MetaNumbers:
    """Checked numbers of Meta's params.json, before anything is computed from them."""

    found: Mapping[str, Any]
    where: Where

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        value = value_or(self.found, key, default)
        if value is None and key.startswith("vision_"):
            raise self.where.child(key).fail("missing; these are not the params of a vision model")
        if type(value) is not int or not least <= value <= most:
            raise self.where.child(key).fail(
                f"expected an integer from {least:,} to {most:,}, found {quoted(value)}"
            )
        return value

    def cross_attention_layers(self, self_layers: int) -> int:
        """How many; an older form nests the number."""
        key = "vision_num_cross_attention_layers"
        nested = self.found.get("vision_model")
        if key not in self.found and isinstance(nested, dict):
            where = self.where.child("vision_model").child("cross_attention_adapter")
            adapter = as_object(nested.get("cross_attention_adapter", {}), where)
            return _MetaNumbers(adapter, where).integer("num_layers", 1, self_layers)
        return self.integer(key, 1, self_layers)

    def feed_forward_width(self, dim: int) -> int:
        """2/3 of 4 dim, times the multiplier, up to the next multiple (llama_models)."""
        multiplier = value_or(self.found, "ffn_dim_multiplier", 1.0)
        if type(multiplier) not in (int, float) or not 0.1 <= multiplier <= 16:
            raise self.where.child("ffn_dim_multiplier").fail(
                f"expected a number from 0.1 to 16, found {quoted(multiplier)}"
            )
        multiple = self.integer("multiple_of", 1, 131_072, default=256)
        width = int(multiplier * int(2 * (4 * dim) / 3))
        return multiple * math.ceil(width / multiple)


def _meta_cross_layers(self_layers: int, count: int, where: Where) -> list[int]:
    """Indices of the cross-attention layers among all layers, as the Hub's config lists them.

    Meta counts self-attention layers only and puts a cross-attention layer before every k-th of
    them, chosen from the last layer downwards (llama_models, CrossAttentionTransformerText).
    """
    step = math.ceil(self_layers / count)
    before = sorted(range(self_layers - 1, -1, -step)[:count])
    if len(before) < count:
        raise where.fail(f"{count} cross-attention layers do not fit among {self_layers} layers")
    return [layer + earlier for earlier, layer in enumerate(before)]
