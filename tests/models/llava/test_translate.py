"""config.json of LLaVAs, read; relatives, and what is not supported, are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmchat.catalog.spec import load_spec, params_document
from mmchat.errors import ParamsError
from mmchat.models.llava.config import LlavaConfig
from tests.models.llava.released import HUB_7B, HUB_PREPROCESSOR, ORIGINAL_7B


def spec_of(folder, document: dict[str, Any], preprocessor: dict[str, Any] | None = None):
    (folder / "config.json").write_text(json.dumps(document))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return load_spec(folder / "config.json")


def test_both_formats_describe_the_same_model_but_for_spare_rows(tmp_path):
    hub = spec_of(tmp_path, HUB_7B, HUB_PREPROCESSOR)
    original = spec_of(tmp_path, ORIGINAL_7B)
    assert isinstance(hub.config, LlavaConfig)
    assert isinstance(original.config, LlavaConfig)
    assert hub.config.vision_config == original.config.vision_config
    assert (hub.config.vocab_size, original.config.vocab_size) == (32_064, 32_000)
    assert (hub.chat_format, original.chat_format) == ("instruct", "instruct")
    assert (hub.generation.temperature, hub.generation.top_p) == (0.2, 1.0)
    pictures = hub.config.image_processor, original.config.image_processor
    assert [(one.square, one.alpha) for one in pictures] == [("pad", "white"), ("pad", "drop")]
    assert original.config.features.tower == "openai/clip-vit-large-patch14-336"
    assert hub.config.positions_per_image == 576


def test_an_original_without_padding_is_cropped(tmp_path):
    for aspect in ("square", None):
        spec = spec_of(tmp_path, ORIGINAL_7B | {"image_aspect_ratio": aspect})
        assert isinstance(spec.config, LlavaConfig)
        assert spec.config.image_processor.square == "crop"


def test_a_conversion_that_says_that_it_does_not_pad_is_cropped(tmp_path):
    for says, square in (
        ({"do_center_crop": True}, "pad"),
        ({"do_pad": True}, "pad"),
        ({"do_pad": False}, "crop"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
        config = spec_of(tmp_path, HUB_7B).config
        assert isinstance(config, LlavaConfig)
        assert config.image_processor.square == square


def test_a_later_type_of_the_original_and_what_transformers_5_writes_are_read(tmp_path):
    later = spec_of(tmp_path, ORIGINAL_7B | {"model_type": "llava_llama"})
    assert later.model_type == "llava"
    text = HUB_7B["text_config"] | {
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "head_dim": 128,
    }
    assert (
        spec_of(tmp_path, HUB_7B | {"text_config": text}).config == spec_of(tmp_path, HUB_7B).config
    )


def test_our_params_file_says_the_same(tmp_path):
    spec = spec_of(tmp_path, ORIGINAL_7B)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(params_document(spec)))
    assert load_spec(path).config == spec.config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llava_next"}, r"LLaVA-NeXT \(1\.6\), which cuts pictures into tiles"),
        ({"image_aspect_ratio": "anyres"}, r"LLaVA-NeXT \(1\.6\)"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"LLaVA-NeXT \(1\.6\)"),
        ({"mm_projector_type": "linear"}, "mm_projector_type.*'linear' is not supported"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "not a vision encoder that mmchat knows"),
        ({"mm_vision_select_layer": -30}, "is not one of the 24 layers"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*'linear'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_attention_heads": 33}, "does not divide"),
    ],
)
def test_other_originals_are_refused(tmp_path, changed, message):
    with pytest.raises(ParamsError, match=message):
        spec_of(tmp_path, ORIGINAL_7B | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_config": {"model_type": "mistral"}}, "text_config.*'mistral' is not supported"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({"vision_feature_layer": [-2, -5]}, "several layers at once"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"image_grid_pinpoints": [[336, 672]]}, r"LLaVA-NeXT \(1\.6\)"),
        ({"vision_feature_select_strategy": "cls"}, "strategy"),
    ],
)
def test_other_conversions_are_refused(tmp_path, changed, message):
    with pytest.raises(ParamsError, match=message):
        spec_of(tmp_path, HUB_7B | changed)


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"resample": 2}, "resample"), ({"size": {"shortest_edge": 224}}, "size"),
     ({"do_normalize": False}, "do_normalize"), ({"rescale_factor": 0.5}, "rescale_factor")],
)  # fmt: skip
def test_pictures_that_are_prepared_otherwise_are_refused(tmp_path, changed, key):
    with pytest.raises(ParamsError, match=f"preprocessor_config.json.*{key}"):
        spec_of(tmp_path, HUB_7B, HUB_PREPROCESSOR | changed)
