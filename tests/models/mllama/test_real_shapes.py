"""Tensor names and shapes of the released models, against hand-written tables and transformers."""

from math import prod

import pytest
import torch

from mmchat.catalog.known import known_specs
from mmchat.checkpoints.mapping import source_shapes
from mmchat.models.mllama.config import (
    ImageProcessorConfig,
    MllamaConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from mmchat.models.mllama.meta_format import meta_rules, shard_dims
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.tensor_names import hf_shapes


def released(text_width: int, tile_size: int) -> MllamaConfig:
    """The 11B (text width 4096) or 90B (8192) model."""
    small = text_width == 4096
    return MllamaConfig(
        vision_config=VisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_global_layers=8,
            attention_heads=16,
            num_channels=3,
            image_size=tile_size,
            patch_size=14,
            max_num_tiles=4,
            intermediate_layers_indices=(3, 7, 15, 23, 30),
            norm_eps=1e-5,
        ),
        text_config=TextConfig(
            vocab_size=128256,
            hidden_size=text_width,
            intermediate_size=14336 if small else 28672,
            num_hidden_layers=40 if small else 100,
            num_attention_heads=32 if small else 64,
            num_key_value_heads=8,
            cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38)
            if small
            else tuple(range(3, 99, 5)),
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
            max_position_embeddings=131072,
        ),
        image_processor=ImageProcessorConfig((0.5,) * 3, (0.5,) * 3, "checkpoint"),
    )


BASE_11B, INSTRUCT_11B, VISION_90B = released(4096, 448), released(4096, 560), released(8192, 560)
MODELS = {"11B base": BASE_11B, "11B instruct": INSTRUCT_11B, "90B": VISION_90B}
BY_FILE = {
    "Llama-3.2-11B-Vision": BASE_11B,
    "Llama-3.2-11B-Vision-Instruct": INSTRUCT_11B,
    "Llama-Guard-3-11B-Vision": INSTRUCT_11B,
    "Llama-3.2-90B-Vision": VISION_90B,
    "Llama-3.2-90B-Vision-Instruct": VISION_90B,
}


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))


@pytest.mark.parametrize(
    ("config", "tensors", "hub", "meta", "vision"),
    [
        (BASE_11B, 906, 10_642_941_475, 10_616_650_275, 836_288_019),
        (INSTRUCT_11B, 906, 10_670_220_835, 10_629_184_035, 863_567_379),
        (VISION_90B, 1494, 88_593_355_323, 88_552_318_523, 863_567_379),
    ],
    ids=MODELS,
)
def test_totals_are_those_of_the_released_models(config, tensors, hub, meta, vision):
    shapes = hf_shapes(config)
    assert len(shapes) == tensors
    assert parameters(shapes) == hub
    assert parameters(source_shapes(meta_rules(config))) == meta
    assert len(source_shapes(meta_rules(config))) == tensors + 1  # the embedding is in two parts
    tower = {name: shape for name, shape in shapes.items() if name.startswith("vision_model.")}
    assert parameters(tower) == vision


def test_a_shard_of_the_90b_model_has_the_right_bytes():
    total = sum(
        2 * prod(shape) // (1 if shard_dims(name) is None else 8)
        for name, shape in source_shapes(meta_rules(VISION_90B)).items()
    )
    assert total == 22_202_467_190


def test_the_known_models_have_these_configurations():
    known = {s.name: s.config for s in known_specs() if s.model_type == "mllama"}
    assert known.keys() == {*BY_FILE, "tiny"}
    for name, config in BY_FILE.items():
        assert hf_shapes(known[name]) == hf_shapes(config), name


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_the_same_names_and_shapes(name):
    from transformers import MllamaConfig as TheirConfig
    from transformers import MllamaForConditionalGeneration as TheirModel
    from transformers.initialization import no_init_weights
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    text, vision = MODELS[name].text_config, MODELS[name].vision_config
    config = TheirConfig(
        # All else is the default of transformers.
        vision_config=MllamaVisionConfig(image_size=vision.image_size),
        text_config=MllamaTextConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            cross_attention_layers=list(text.cross_attention_layers),
        ),
    )
    with torch.device("meta"), no_init_weights():
        state = TheirModel(config).state_dict()
    found = {}
    for key, tensor in state.items():
        key = "language_model." + key if key.startswith("lm_head") else key.removeprefix("model.")
        if key.startswith("language_model.") and "lm_head" not in key:
            key = key.replace("language_model.", "language_model.model.", 1)
        found[key] = tuple(tensor.shape)
    assert found == hf_shapes(MODELS[name])


@pytest.mark.parametrize("name", [*MODELS, "tiny"])
def test_our_model_has_the_same_names_and_shapes(name):
    tiny = next(spec.config for spec in known_specs() if spec.name == "tiny")
    config = MODELS.get(name, tiny)
    with torch.device("meta"):
        state = MllamaForConditionalGeneration(config).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == hf_shapes(config)


# What the Hub's index of the 11B instruct model lists, one layer of each kind.
HUB_11B_INSTRUCT = {
    "language_model.lm_head.weight": (128256, 4096),
    "language_model.model.embed_tokens.weight": (128264, 4096),
    "language_model.model.norm.weight": (4096,),
    "language_model.model.layers.0.input_layernorm.weight": (4096,),
    "language_model.model.layers.0.mlp.down_proj.weight": (4096, 14336),
    "language_model.model.layers.0.mlp.gate_proj.weight": (14336, 4096),
    "language_model.model.layers.0.mlp.up_proj.weight": (14336, 4096),
    "language_model.model.layers.0.post_attention_layernorm.weight": (4096,),
    "language_model.model.layers.0.self_attn.k_proj.weight": (1024, 4096),
    "language_model.model.layers.0.self_attn.o_proj.weight": (4096, 4096),
    "language_model.model.layers.0.self_attn.q_proj.weight": (4096, 4096),
    "language_model.model.layers.0.self_attn.v_proj.weight": (1024, 4096),
    "language_model.model.layers.3.cross_attn.k_norm.weight": (128,),
    "language_model.model.layers.3.cross_attn.k_proj.weight": (1024, 4096),
    "language_model.model.layers.3.cross_attn.o_proj.weight": (4096, 4096),
    "language_model.model.layers.3.cross_attn.q_norm.weight": (128,),
    "language_model.model.layers.3.cross_attn.q_proj.weight": (4096, 4096),
    "language_model.model.layers.3.cross_attn.v_proj.weight": (1024, 4096),
    "language_model.model.layers.3.cross_attn_attn_gate": (1,),
    "language_model.model.layers.3.cross_attn_mlp_gate": (1,),
    "language_model.model.layers.3.input_layernorm.weight": (4096,),
    "language_model.model.layers.3.mlp.down_proj.weight": (4096, 14336),
    "language_model.model.layers.3.mlp.gate_proj.weight": (14336, 4096),
    "language_model.model.layers.3.mlp.up_proj.weight": (14336, 4096),
    "language_model.model.layers.3.post_attention_layernorm.weight": (4096,),
    "multi_modal_projector.bias": (4096,),
    "multi_modal_projector.weight": (4096, 7680),
    "vision_model.class_embedding": (1280,),
    "vision_model.gated_positional_embedding.embedding": (1601, 1280),
    "vision_model.gated_positional_embedding.gate": (1,),
    "vision_model.gated_positional_embedding.tile_embedding.weight": (9, 8197120),
    "vision_model.layernorm_post.bias": (1280,),
    "vision_model.layernorm_post.weight": (1280,),
    "vision_model.layernorm_pre.bias": (1280,),
    "vision_model.layernorm_pre.weight": (1280,),
    "vision_model.patch_embedding.weight": (1280, 3, 14, 14),
    "vision_model.post_tile_positional_embedding.embedding.weight": (9, 5120),
    "vision_model.post_tile_positional_embedding.gate": (1,),
    "vision_model.pre_tile_positional_embedding.embedding.weight": (9, 5120),
    "vision_model.pre_tile_positional_embedding.gate": (1,),
    **{
        f"vision_model.{stack}.layers.0.{part}": shape
        for stack in ("transformer", "global_transformer")
        for part, shape in {
            "input_layernorm.bias": (1280,),
            "input_layernorm.weight": (1280,),
            "mlp.fc1.bias": (5120,),
            "mlp.fc1.weight": (5120, 1280),
            "mlp.fc2.bias": (1280,),
            "mlp.fc2.weight": (1280, 5120),
            "post_attention_layernorm.bias": (1280,),
            "post_attention_layernorm.weight": (1280,),
            "self_attn.k_proj.weight": (1280, 1280),
            "self_attn.o_proj.weight": (1280, 1280),
            "self_attn.q_proj.weight": (1280, 1280),
            "self_attn.v_proj.weight": (1280, 1280),
        }.items()
    },
    "vision_model.global_transformer.layers.0.gate_attn": (1,),
    "vision_model.global_transformer.layers.0.gate_ffn": (1,),
}


def test_the_hub_table_written_by_hand_is_part_of_the_shapes():
    shapes = hf_shapes(INSTRUCT_11B)
    assert {name: shapes.get(name) for name in HUB_11B_INSTRUCT} == HUB_11B_INSTRUCT
    # 32 + 8 text layers, 32 + 8 vision layers: nothing beside what the table lists of each.
    text, cross = 9, 13
    local, gated = 12, 14
    others = len(HUB_11B_INSTRUCT) - text - cross - local - gated
    assert len(shapes) == others + 32 * text + 8 * cross + 32 * local + 8 * gated


# Meta's names of the same, one layer of each kind, and the axis along which shards are joined.
META_90B = {
    "text_model.tok_embeddings.weight": ((128256, 8192), 0),
    "text_model.learnable_embedding.weight": ((8, 8192), 0),
    "text_model.norm.weight": ((8192,), None),
    "text_model.output.weight": ((128256, 8192), 0),
    "text_model.layers.79.attention.wq.weight": ((8192, 8192), 0),
    "text_model.layers.79.attention.wk.weight": ((1024, 8192), 0),
    "text_model.layers.79.attention.wv.weight": ((1024, 8192), 0),
    "text_model.layers.79.attention.wo.weight": ((8192, 8192), 1),
    "text_model.layers.79.attention_norm.weight": ((8192,), None),
    "text_model.layers.79.ffn_norm.weight": ((8192,), None),
    "text_model.layers.79.feed_forward.w1.weight": ((28672, 8192), 0),
    "text_model.layers.79.feed_forward.w2.weight": ((8192, 28672), 1),
    "text_model.layers.79.feed_forward.w3.weight": ((28672, 8192), 0),
    "text_model.cross_attention_layers.19.attention.wq.weight": ((8192, 8192), 0),
    "text_model.cross_attention_layers.19.attention.wk.weight": ((1024, 8192), 0),
    "text_model.cross_attention_layers.19.attention.wv.weight": ((1024, 8192), 0),
    "text_model.cross_attention_layers.19.attention.wo.weight": ((8192, 8192), 1),
    "text_model.cross_attention_layers.19.attention.q_norm.weight": ((128,), None),
    "text_model.cross_attention_layers.19.attention.k_norm.weight": ((128,), None),
    "text_model.cross_attention_layers.19.attention_norm.weight": ((8192,), None),
    "text_model.cross_attention_layers.19.ffn_norm.weight": ((8192,), None),
    "text_model.cross_attention_layers.19.feed_forward.w1.weight": ((28672, 8192), 0),
    "text_model.cross_attention_layers.19.feed_forward.w2.weight": ((8192, 28672), 1),
    "text_model.cross_attention_layers.19.feed_forward.w3.weight": ((28672, 8192), 0),
    "text_model.cross_attention_layers.19.gate_attn": ((1,), None),
    "text_model.cross_attention_layers.19.gate_ffwd": ((1,), None),
    "vision_model.vision_projection.weight": ((8192, 7680), 0),
    "vision_model.vision_projection.bias": ((8192,), 0),
    **{
        f"vision_model.vision_encoder.{name}": shape
        for name, shape in {
            "conv1._linear.weight": ((1280, 588), 0),
            "class_embedding": ((1280,), None),
            "positional_embedding": ((1601, 1280), None),
            "gated_positional_embedding": ((4, 4, 1601, 1280), None),
            "gated_positional_embedding_gate": ((1,), None),
            "pre_tile_pos_embed.embedding": ((4, 4, 1, 1280), None),
            "pre_tile_pos_embed.gate": ((1,), None),
            "post_tile_pos_embed.embedding": ((4, 4, 1, 1280), None),
            "post_tile_pos_embed.gate": ((1,), None),
            "ln_pre.weight": ((1280,), None),
            "ln_pre.bias": ((1280,), None),
            "ln_post.weight": ((1280,), None),
            "ln_post.bias": ((1280,), None),
            "global_transformer.resblocks.7.gate_attn": ((1,), None),
            "global_transformer.resblocks.7.gate_ffn": ((1,), None),
        }.items()
    },
    **{
        f"vision_model.vision_encoder.{stack}.{name}": shape
        for stack in ("transformer.resblocks.31", "global_transformer.resblocks.7")
        for name, shape in {
            "attn.wq.weight": ((1280, 1280), 0),
            "attn.wk.weight": ((1280, 1280), 0),
            "attn.wv.weight": ((1280, 1280), 0),
            "attn.wo.weight": ((1280, 1280), 1),
            "mlp.c_fc.weight": ((5120, 1280), 0),
            "mlp.c_fc.bias": ((5120,), 0),
            "mlp.c_proj.weight": ((1280, 5120), 1),
            "mlp.c_proj.bias": ((1280,), None),
            "ln_1.weight": ((1280,), None),
            "ln_1.bias": ((1280,), None),
            "ln_2.weight": ((1280,), None),
            "ln_2.bias": ((1280,), None),
        }.items()
    },
}


def test_the_meta_table_written_by_hand_is_part_of_the_shapes():
    shapes = source_shapes(meta_rules(VISION_90B))
    found = {name: (shapes.get(name), shard_dims(name)) for name in META_90B}
    assert found == META_90B
    text, cross, local, gated = 9, 13, 12, 14
    others = len(META_90B) - text - cross - local - gated
    assert len(shapes) == others + 80 * text + 20 * cross + 32 * local + 8 * gated


@pytest.mark.parametrize("name", MODELS)
def test_layers_go_to_their_places(name):
    """Every fourth self-attention layer of Meta's comes after a cross-attention block."""
    target = {rule.sources[0]: rule.target for rule in meta_rules(MODELS[name])}
    cross = len(MODELS[name].text_config.cross_attention_layers)
    for i in range(4 * cross):
        source = f"text_model.layers.{i}.attention.wq.weight"
        expected = f"language_model.model.layers.{i + (i + 1) // 4}.self_attn.q_proj.weight"
        assert target[source] == expected
    for j in range(cross):
        source = f"text_model.cross_attention_layers.{j}.gate_ffwd"
        assert target[source] == f"language_model.model.layers.{5 * j + 3}.cross_attn_mlp_gate"


@pytest.mark.parametrize("name", MODELS)
def test_rules_are_total_and_lead_to_each_tensor_once(name):
    rules = meta_rules(MODELS[name])
    targets = [rule.target for rule in rules]
    sources = [source for rule in rules for source in rule.sources]
    assert sorted(targets) == sorted(hf_shapes(MODELS[name]))
    assert sorted(sources) == sorted(source_shapes(meta_rules(MODELS[name])))
