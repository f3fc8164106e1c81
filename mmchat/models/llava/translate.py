"""The configurations of others to ours: LLaVA's own config.json and that of the Hub's conversions.

Both say `model_type: "llava"`. The original one is flat, names its vision encoder and does not
describe it; the other has text_config and vision_config. Keys that do not matter here are passed
over, missing ones take the defaults of their makers, and what this model cannot do is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmchat.errors import quoted
from mmchat.models.family import Translated
from mmchat.models.hub_config import (
    check_preprocessor,
    folder_documents,
    levels_of,
    preprocessor_document,
    refuse_other,
    value_or,
    with_defaults,
)
from mmchat.models.llava.config import TOWERS, LlavaConfig, known_tower, parse
from mmchat.strict_json import Where, as_object
from mmchat.tokenizers.base import Tokenizer

# Defaults of transformers' LlamaConfig and CLIPVisionConfig (of the latter the patch size and what
# the Hub's files leave out): a saved config.json may leave out every key that equals its default.
_TEXT: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
_VISION = TOWERS["openai/clip-vit-large-patch14-336"]
_NEXT = (
    "LLaVA-NeXT (1.6), which cuts pictures into tiles, is not supported;"
    " mmchat runs LLaVA-1.5, such as llava-hf/llava-1.5-7b-hf"
)
_BICUBIC = 3  # Pillow's number


def from_hub(
    found: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    where: Where,
    preprocessor_where: Where,
) -> Translated[LlavaConfig]:
    """Translate config.json of either kind. Raises where's error."""
    if "text_config" in found or "vision_config" in found:
        config = _from_conversion(found, preprocessor or {}, where, preprocessor_where)
        return Translated(config, is_chat=True)
    if "mm_vision_tower" in found:
        return Translated(_from_original(found, where), is_chat=True)
    raise where.fail("neither text_config nor mm_vision_tower: it does not describe a LLaVA")


def _from_conversion(
    found: Mapping[str, Any], preprocessor: Mapping[str, Any], where: Where, pictures: Where
) -> LlavaConfig:
    vision_where, text_where = where.child("vision_config"), where.child("text_config")
    vision = as_object(found.get("vision_config", {}), vision_where)
    text = as_object(found.get("text_config", {}), text_where)
    for key in ("image_grid_pinpoints", "use_image_newline_parameter"):
        if found.get(key):
            raise where.child(key).fail(_NEXT)
    refuse_other(text, {"model_type": "llama"}, text_where)
    refuse_other(vision, {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
                 vision_where)  # fmt: skip
    expected = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
    }
    refuse_other(found, expected, where)
    layer = value_or(found, "vision_feature_layer", -2)
    if isinstance(layer, list):
        raise where.child("vision_feature_layer").fail("several layers at once are not supported")
    side, size = value_or(vision, "image_size", 336), preprocessor.get("size")
    if isinstance(size, dict) and size.get("shortest_edge") != side:
        raise pictures.child("size").fail(f"{quoted(size)} is not supported here, only {side}")
    check_preprocessor(preprocessor, {"resample": _BICUBIC}, pictures)
    sections = {
        "vision_config": with_defaults(vision, _VISION),
        "text_config": _text(text, text_where),
        "features": {
            "layer": layer,
            "strategy": value_or(found, "vision_feature_select_strategy", "default"),
            "tower": None,
        },
        # The weights are the original's, which were trained with padded squares. The released file
        # says that the middle is cut out and has no word for padding; where one has it, it counts.
        "image_processor": {
            **levels_of(preprocessor),
            "square": "crop" if preprocessor.get("do_pad") is False else "pad",
            "alpha": "white",
        },
    }
    return parse(sections, where)


def _from_original(found: Mapping[str, Any], where: Where) -> LlavaConfig:
    aspect = found.get("image_aspect_ratio")
    if aspect == "anyres" or str(found.get("mm_patch_merge_type", "flat")) not in ("flat", "None"):
        raise where.child("mm_patch_merge_type").fail(_NEXT)
    if aspect not in ("pad", "square", None):
        raise where.child("image_aspect_ratio").fail(f"{quoted(aspect)} is not supported")
    expected = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "s2": False,
        "tie_word_embeddings": False,
    }
    refuse_other(found, expected, where)
    named = found["mm_vision_tower"]
    tower = known_tower(named) if isinstance(named, str) else None
    if tower is None:
        raise where.child("mm_vision_tower").fail(
            f"{quoted(named)} is not a vision encoder that mmchat knows;"
            f" these are {', '.join(map(quoted, TOWERS))}"
        )
    strategies = {"patch": "default", "cls_patch": "full"}
    selected = value_or(found, "mm_vision_select_feature", "patch")
    if selected not in strategies:
        raise where.child("mm_vision_select_feature").fail(f"{quoted(selected)} is not supported")
    own = found.get("unfreeze_mm_vision_tower") is True  # trained, so it is in the checkpoint
    sections = {
        "vision_config": TOWERS[tower],
        "text_config": _text(found, where),
        "features": {
            "layer": value_or(found, "mm_vision_select_layer", -2),
            "strategy": strategies[selected],
            "tower": None if own else tower,
        },
        "image_processor": {
            **levels_of(),
            "square": "pad" if aspect == "pad" else "crop",
            "alpha": "drop",
        },
    }
    return parse(sections, where)


def _text(found: Mapping[str, Any], where: Where) -> dict[str, Any]:
    refuse_other(
        found,
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "tie_word_embeddings": False},
        where,
    )  # fmt: skip
    text = with_defaults(found, _TEXT)
    text["num_key_value_heads"] = value_or(
        found, "num_key_value_heads", text["num_attention_heads"]
    )
    rope = found.get("rope_parameters") or {}
    scaling = found.get("rope_scaling") or {}
    for key, given in (("rope_parameters", rope), ("rope_scaling", scaling)):
        kind = as_object(given, where.child(key)).get("rope_type", given.get("type", "default"))
        if given and kind != "default":
            raise where.child(key).fail(f"{quoted(kind)} is not supported")
    theta = value_or(rope, "rope_theta", value_or(found, "rope_theta", 10_000.0))
    return {**text, "rope_theta": theta}


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
    return folder_documents(model, generation, ends, pictures)
