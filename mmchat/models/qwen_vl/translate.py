"""Qwen-VL's own config.json to our configuration, and back to the documents of a Hub folder.

Keys that do not matter here are passed over, and what this model cannot do is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.models.family import Translated
from mmchat.models.hub_config import (
    folder_documents,
    levels_of,
    refuse_other,
    value_or,
    with_defaults,
)
from mmchat.models.qwen_vl.config import QwenVLConfig, parse
from mmchat.strict_json import Where, as_object
from mmchat.tokenizers.base import Tokenizer

# Defaults of the original's QWenConfig and VisionTransformer.
_TEXT: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10_000,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
_VISION = ("width", "layers", "heads", "mlp_ratio", "image_size", "patch_size")


def from_hub(
    found: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,  # noqa: ARG001  no model has that file
    where: Where,
    preprocessor_where: Where,  # noqa: ARG001
) -> Translated[QwenVLConfig]:
    """Translate config.json, which does not say whether the model chats. Raises where's error."""
    if "visual" not in found:
        raise where.fail("no key 'visual': a Qwen for text alone; mmchat runs Qwen-VL")
    visual_where = where.child("visual")
    visual = as_object(found["visual"], visual_where)
    text = with_defaults(found, _TEXT)
    width, heads = text["hidden_size"], text["num_attention_heads"]
    expected = {"rotary_pct": 1.0, "no_bias": True, "tie_word_embeddings": False,
                "scale_attn_weights": True}  # fmt: skip
    if isinstance(width, int) and isinstance(heads, int) and heads:
        expected["kv_channels"] = width // heads
    refuse_other(found, expected, where)
    refuse_other(visual, {"output_dim": width}, visual_where)
    inner = value_or(found, "intermediate_size", 22_016)
    if type(inner) is not int or inner % 2:
        raise where.child("intermediate_size").fail("expected an even number, twice the MLP's")
    for key in ("layer_norm_epsilon", "rotary_emb_base"):
        text[key] = _real(text[key])
    vision = {key: visual[key] for key in _VISION if key in visual}
    sections = {
        "vision_config": {**vision, "n_queries": value_or(visual, "n_queries", 256)},
        "text_config": {**text, "intermediate_size": inner // 2},
        "image_processor": {**levels_of(), "alpha": "drop"},
    }
    return Translated(parse(sections, where), is_chat=None)


def _real(value: object) -> object:
    """An integer as the number that it is."""
    return float(value) if type(value) is int else value


def hub_documents(
    config: QwenVLConfig,
    tokenizer: Tokenizer,
    *,
    is_chat: bool,
    dtype: str,
    generation: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """File name -> content of the JSON files of a folder of the Hub."""
    vision, text = asdict(config.vision_config), asdict(config.text_config)
    end = tokenizer.special_id("<|endoftext|>")
    model = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "torch_dtype": dtype,
        **text,
        "intermediate_size": 2 * config.text_config.intermediate_size,
        "kv_channels": config.text_config.head_dim,
        "no_bias": True,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
        "visual": {
            **vision,
            "output_dim": config.text_config.hidden_size,
            "image_start_id": tokenizer.special_id("<img>"),
        },
    }
    chat_format = "chatml" if is_chat else "raw"
    tokens = {"chat_format": chat_format, "eos_token_id": end, "pad_token_id": end}
    return folder_documents(model, generation, tokens)
