import json
from dataclasses import asdict, replace

import pytest
import torch

from mmchat.catalog.known import find_spec, known_specs
from mmchat.catalog.spec import load_spec
from mmchat.errors import ParamsError
from mmchat.models.family import parameter_count
from mmchat.models.mllama.family import MllamaFamily
from mmchat.models.mllama.meta_format import from_makers, from_meta_params
from mmchat.models.mllama.tensor_names import hf_shapes
from mmchat.models.mllama.translate import from_hf_config
from mmchat.strict_json import Where

WHERE = Where("config.json")
META_11B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 560,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 8,
}
META_90B = META_11B | {
    "dim": 8192,
    "n_layers": 80,
    "n_heads": 64,
    "multiple_of": 4096,
    "vision_num_cross_attention_layers": 20,
}
SPECS = [spec for spec in known_specs() if spec.model_type == "mllama"]
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hub_config(config):
    """config.json of transformers 4.45, with all keys."""
    vision, text = asdict(config.vision_config), asdict(config.text_config)
    text["rope_scaling"] = {"rope_type": "llama3", **text["rope_scaling"]}
    vision |= {
        "model_type": "mllama_vision_model",
        "hidden_act": "gelu",
        "vision_output_dim": config.vision_config.output_dim,
        "supported_aspect_ratios": [list(r) for r in config.vision_config.aspect_ratios],
    }
    text |= {
        "model_type": "mllama_text_model",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": 0,
    }
    top = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_id,
        "torch_dtype": "bfloat16",
    }
    return json.loads(json.dumps({**top, "vision_config": vision, "text_config": text}))


def transformers_config(config):
    import transformers

    found = hub_config(config)
    found["text_config"]["rope_parameters"] = {
        **found["text_config"].pop("rope_scaling"),
        "rope_theta": found["text_config"].pop("rope_theta"),
    }
    return transformers.MllamaConfig(
        vision_config=found["vision_config"],
        text_config=found["text_config"],
        image_token_index=config.image_token_id,
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_both_spellings_of_the_hub_give_our_configuration(spec, tmp_path):
    pictures = replace(spec.config.image_processor, alpha="checkpoint")
    expected = replace(spec.config, image_processor=pictures)
    assert from_hf_config(hub_config(spec.config), None, WHERE) == expected
    transformers_config(spec.config).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in json.dumps(new)
    assert from_hf_config(new, None, WHERE) == expected


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_parameters_are_those_of_transformers(spec):
    import transformers

    with torch.device("meta"):
        model = transformers.MllamaForConditionalGeneration(transformers_config(spec.config))
    assert parameter_count(hf_shapes(spec.config)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Llama-3.2-11B-Vision", 10_642_941_475),
        ("Llama-3.2-11B-Vision-Instruct", 10_670_220_835),
        ("Llama-3.2-90B-Vision", 88_593_355_323),
        ("Llama-3.2-90B-Vision-Instruct", 88_593_355_323),
        ("Llama-Guard-3-11B-Vision", 10_670_220_835),
    ],
)
def test_published_parameter_totals(name, total):
    assert find_spec(name).parameters == total


def test_a_config_with_only_what_differs_takes_the_hubs_defaults():
    found = {
        "model_type": "mllama",
        "transformers_version": "4.45.0",
        "vision_config": {"image_size": 560},
        "text_config": {"rope_scaling": SCALING},
    }
    assert from_hf_config(found, None, WHERE) == find_spec("llama3.2-11B").config
    unscaled = from_hf_config({"text_config": {}}, None, WHERE).text_config
    assert (unscaled.rope_scaling, unscaled.rope_theta) == (None, 500_000.0)


def test_the_preprocessors_mean_and_std_are_taken():
    preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    config = from_hf_config({}, preprocessor, WHERE)
    processor = config.image_processor
    assert (processor.image_mean, processor.image_std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert [MllamaFamily().alpha(config, f) for f in ("hf", "meta")] == ["white", "drop"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_image_tiles": 2}, "max_image_tiles: 2 is not supported here, only 4"),
        ({"resample": 3}, "resample: 3 is not supported here, only 2"),
        ({"size": {"height": 560, "width": 560}}, "size: .*'height': 448"),
        ({"rescale_factor": 1.0}, "rescale_factor: 1.0"),
        ({"do_normalize": False}, "do_normalize: False"),
        ({"do_pad": False}, "do_pad: False"),
    ],
)
def test_another_way_to_prepare_pictures_is_refused(change, message, tmp_path):
    released = {
        "max_image_tiles": 4, "resample": 2, "size": {"height": 448, "width": 448},
        "rescale_factor": 0.00392156862745098, "do_normalize": True, "do_pad": True,
        "do_rescale": True, "do_resize": True, "do_convert_rgb": True,
    }  # fmt: skip
    found = {"model_type": "mllama", "architectures": []}
    (tmp_path / "config.json").write_text(json.dumps(found))
    own, outer = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    own.write_text(json.dumps(released))
    load_spec(tmp_path / "config.json")
    own.write_text(json.dumps(released | change))
    with pytest.raises(ParamsError, match=f"preprocessor_config.json: {message}"):
        load_spec(tmp_path / "config.json")
    own.write_text(json.dumps(released))
    outer.write_text(json.dumps({"image_processor": released | change}))
    with pytest.raises(ParamsError, match=f"/processor_config.json: image_processor.{message}"):
        load_spec(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act: 'relu' is not"),
        ({"text_config": {"tie_word_embeddings": True}}, "text_config.tie_word_embeddings: True"),
        ({"text_config": {"rope_scaling": {"type": "yarn"}}}, "rope_type 'yarn' is not supported"),
        ({"text_config": {"rope_scaling": {"type": "llama3"}}}, "rope_scaling.factor: expected"),
        ({"text_config": {"hidden_size": 4100}}, "num_attention_heads: 32 does not divide"),
        ({"text_config": {"vocab_size": 10**9}}, "vocab_size: 1000000000 is out of range"),
        ({"image_token_index": 128257}, "image_token_index: 128257 is no row of an embedding"),
        ({"vision_config": {"vision_output_dim": 1280}}, "vision_output_dim: 1280"),
        ({"vision_config": {"supported_aspect_ratios": [[1, 1]]}}, "supported_aspect_ratios"),
        ({"vision_config": []}, "vision_config: expected an object"),
    ],
)
def test_what_the_model_cannot_do_is_refused(found, message):
    with pytest.raises(ParamsError, match=message):
        from_hf_config(found, None, WHERE)


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        (META_11B, "Llama-3.2-11B-Vision-Instruct"),
        (META_11B | {"vision_chunk_size": 448}, "Llama-3.2-11B-Vision"),
        (META_90B, "Llama-3.2-90B-Vision"),
        ({"model": META_90B}, "Llama-3.2-90B-Vision-Instruct"),
        (META_11B | {"vision_max_num_chunks": None, "unknown": [1]}, "llama3.2-11B"),
    ],
)
def test_metas_params_give_our_configuration(meta, name):
    assert from_makers(meta, "", WHERE).config == find_spec(name).config


def test_an_older_form_nests_the_number_of_cross_attention_layers():
    old = {k: v for k, v in META_11B.items() if k != "vision_num_cross_attention_layers"}
    old["vision_model"] = {"cross_attention_adapter": {"num_layers": 8}}
    assert from_meta_params(old, WHERE) == from_meta_params(META_11B, WHERE)
    without = {k: v for k, v in META_11B.items() if k != "n_kv_heads"}
    assert from_meta_params(without, WHERE).text_config.num_key_value_heads == 32


@pytest.mark.parametrize(
    ("self_layers", "cross", "expected"),
    [(4, 2, (1, 4)), (4, 1, (3,)), (5, 2, (1, 5)), (6, 3, (1, 4, 7)), (3, 3, (0, 2, 4))],
)
def test_cross_attention_layers_are_placed_from_the_last_layer_downwards(
    self_layers, cross, expected
):
    meta = META_11B | {"n_layers": self_layers, "vision_num_cross_attention_layers": cross}
    assert from_meta_params(meta, WHERE).text_config.cross_attention_layers == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 10**9}, "dim: 1000000000 is out of range; 8 to 32,768 is possible"),
        ({"dim": 4096.0}, "dim: expected an integer"),
        ({"n_layers": True}, "n_layers: expected an integer"),
        ({"vision_chunk_size": None}, "vision_chunk_size: missing; .* not the params of a vision"),
        (
            {"vision_num_cross_attention_layers": 99},
            "99 cross-attention layers do not fit",
        ),
        ({"n_layers": 5, "vision_num_cross_attention_layers": 4}, "do not fit among 5 layers"),
        ({"ffn_dim_multiplier": 1e9}, "ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"n_heads": 3}, "num_attention_heads: 3 does not divide hidden_size"),
        ({"vision_chunk_size": 450}, "patch_size: 14 does not divide image_size = 450"),
    ],
)
def test_wrong_numbers_in_metas_params_are_named(change, message):
    with pytest.raises(ParamsError, match=message):
        from_meta_params(META_11B | change, WHERE)
