"""Names, shapes and totals of the released LLaVA-1.5, 7B and 13B."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from mmchat.catalog.known import find_spec
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.model import LlavaForConditionalGeneration
from mmchat.models.llava.tensor_names import VISION, hub_shapes, unused
from mmchat.models.llava.translate import from_hub
from mmchat.nn.shapes_only import shapes_only
from mmchat.strict_json import Where
from tests.models.llava.released import HUB_7B, HUB_13B, ORIGINAL_7B, ORIGINAL_13B
from tests.models.llava.transformers_llava import in_memory, their_config


def config_of(document: dict) -> LlavaConfig:
    return from_hub(document, None, Where("config.json"), Where("preprocessor_config.json")).config


HUB = {"7B": config_of(HUB_7B), "13B": config_of(HUB_13B)}
ORIGINAL = {"7B": config_of(ORIGINAL_7B), "13B": config_of(ORIGINAL_13B)}


def parameters(shapes) -> int:
    return sum(map(prod, shapes.values()))


@pytest.mark.parametrize(
    ("config", "tensors", "total"),
    [
        (HUB["7B"], 686, 7_063_427_072),
        (HUB["13B"], 758, 13_351_494_656),
        (ORIGINAL["7B"], 686, 7_062_902_784),
        (ORIGINAL["13B"], 758, 13_350_839_296),
    ],
)
def test_totals_are_those_of_the_released_models(config, tensors, total):
    shapes = hub_shapes(config)
    assert len(shapes) == tensors
    assert parameters(shapes) == total


@pytest.mark.parametrize(("name", "size"), [("llava", "7B"), ("llava:13b", "13B")])
def test_the_known_models_have_these_configurations(name, size):
    spec = find_spec(name)
    assert spec is not None
    assert spec.config == HUB[size]
    assert spec.family.companion(spec.config) is None
    assert spec.family.companion(ORIGINAL[size]) == "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize("config", [HUB["7B"], HUB["13B"]])
def test_parts_have_the_published_sizes(config):
    shapes = hub_shapes(config)
    tower = {name: shape for name, shape in shapes.items() if name.startswith(VISION)}
    used = {name: shape for name, shape in tower.items() if not name.startswith(unused(config))}
    assert len(tower) == 391
    assert (parameters(tower), parameters(used)) == (303_507_456, 290_909_184)
    projector = {n: s for n, s in shapes.items() if n.startswith("multi_modal_projector.")}
    width = config.text_config.hidden_size
    assert parameters(projector) == {4096: 20_979_712, 5120: 31_467_520}[width]


def test_the_original_file_of_the_7b_has_the_bytes_that_its_index_says():
    """Without the tower, and with the frequencies of each layer in float32."""
    shapes = {n: s for n, s in hub_shapes(ORIGINAL["7B"]).items() if not n.startswith(VISION)}
    assert len(shapes) + 32 == 327
    assert 2 * parameters(shapes) + 32 * 64 * 4 == 13_518_798_848


@pytest.mark.parametrize("size", HUB)
def test_transformers_has_the_same_names_and_shapes(size):
    from transformers import LlavaForConditionalGeneration as TheirModel
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        state = TheirModel(their_config(HUB[size])).state_dict()
    expected = {in_memory(name): shape for name, shape in hub_shapes(HUB[size]).items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("size", HUB)
def test_our_model_has_the_same_names_and_shapes(size):
    with shapes_only():
        model = LlavaForConditionalGeneration(HUB[size])
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert state == hub_shapes(HUB[size])
    loaded = model.weight_names(text_only=False)
    assert len(state) - len(loaded) == 16 + 2  # a layer and the norm behind it
    text = model.weight_names(text_only=True)
    assert {name.split(".")[0] for name in text} == {"language_model"}


# What the Hub's index of the 7B lists, one layer of each kind.
HUB_TABLE = {
    "language_model.lm_head.weight": (32064, 4096),
    "language_model.model.embed_tokens.weight": (32064, 4096),
    "language_model.model.norm.weight": (4096,),
    "language_model.model.layers.31.input_layernorm.weight": (4096,),
    "language_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
    "language_model.model.layers.31.mlp.gate_proj.weight": (11008, 4096),
    "language_model.model.layers.31.mlp.up_proj.weight": (11008, 4096),
    "language_model.model.layers.31.post_attention_layernorm.weight": (4096,),
    "language_model.model.layers.31.self_attn.k_proj.weight": (4096, 4096),
    "language_model.model.layers.31.self_attn.o_proj.weight": (4096, 4096),
    "language_model.model.layers.31.self_attn.q_proj.weight": (4096, 4096),
    "language_model.model.layers.31.self_attn.v_proj.weight": (4096, 4096),
    "multi_modal_projector.linear_1.bias": (4096,),
    "multi_modal_projector.linear_1.weight": (4096, 1024),
    "multi_modal_projector.linear_2.bias": (4096,),
    "multi_modal_projector.linear_2.weight": (4096, 4096),
    "vision_tower.vision_model.embeddings.class_embedding": (1024,),
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
    "vision_tower.vision_model.encoder.layers.23.layer_norm1.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.layer_norm1.weight": (1024,),
    "vision_tower.vision_model.encoder.layers.23.layer_norm2.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.layer_norm2.weight": (1024,),
    "vision_tower.vision_model.encoder.layers.23.mlp.fc1.bias": (4096,),
    "vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    "vision_tower.vision_model.encoder.layers.23.mlp.fc2.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.mlp.fc2.weight": (1024, 4096),
    "vision_tower.vision_model.encoder.layers.23.self_attn.k_proj.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.self_attn.k_proj.weight": (1024, 1024),
    "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.weight": (1024, 1024),
    "vision_tower.vision_model.encoder.layers.23.self_attn.q_proj.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.self_attn.q_proj.weight": (1024, 1024),
    "vision_tower.vision_model.encoder.layers.23.self_attn.v_proj.bias": (1024,),
    "vision_tower.vision_model.encoder.layers.23.self_attn.v_proj.weight": (1024, 1024),
    "vision_tower.vision_model.post_layernorm.bias": (1024,),
    "vision_tower.vision_model.post_layernorm.weight": (1024,),
    "vision_tower.vision_model.pre_layrnorm.bias": (1024,),
    "vision_tower.vision_model.pre_layrnorm.weight": (1024,),
}


def test_the_table_written_by_hand_is_part_of_the_shapes():
    shapes = hub_shapes(HUB["7B"])
    assert {name: shapes.get(name) for name in HUB_TABLE} == HUB_TABLE
    text, vision = 9, 16
    assert len(shapes) == len(HUB_TABLE) + 31 * text + 23 * vision


def test_fewer_layers_are_used_where_the_features_come_earlier():
    config = replace(HUB["7B"], features=replace(HUB["7B"].features, layer=-4))
    left_out = [name for name in hub_shapes(config) if name.startswith(unused(config))]
    assert config.vision_layers_used == 21
    assert len(left_out) == 3 * 16 + 2
