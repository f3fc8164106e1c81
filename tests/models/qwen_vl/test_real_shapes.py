"""Names, shapes and totals of the released Qwen-VL, base and chat."""

from __future__ import annotations

from math import prod

import pytest
import torch

from mmchat.catalog.known import answering_sibling, find_spec
from mmchat.hub.client import HubFile
from mmchat.hub.selection import select
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration
from mmchat.models.qwen_vl.tensor_names import VISION, footprint, hub_name, hub_shapes
from mmchat.models.qwen_vl.translate import from_hub
from mmchat.nn.shapes_only import shapes_only
from mmchat.strict_json import Where

# config.json of Qwen/Qwen-VL-Chat, as far as mmchat reads it.
RELEASED = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}
CONFIG: QwenVLConfig = from_hub(RELEASED, None, Where("config.json"), Where("")).config
TOTAL = 9_656_935_168
# Some of each kind, from the checkpoint's own table.
SHAPES = {
    "transformer.wte.weight": (151_936, 4096),
    "lm_head.weight": (151_936, 4096),
    "transformer.ln_f.weight": (4096,),
    "transformer.h.31.ln_1.weight": (4096,),
    "transformer.h.31.ln_2.weight": (4096,),
    "transformer.h.0.attn.c_attn.weight": (12_288, 4096),
    "transformer.h.0.attn.c_attn.bias": (12_288,),
    "transformer.h.0.attn.c_proj.weight": (4096, 4096),
    "transformer.h.0.mlp.w1.weight": (11_008, 4096),
    "transformer.h.0.mlp.w2.weight": (11_008, 4096),
    "transformer.h.0.mlp.c_proj.weight": (4096, 11_008),
    "transformer.visual.conv1.weight": (1664, 3, 14, 14),
    "transformer.visual.positional_embedding": (256, 1664),
    "transformer.visual.ln_pre.bias": (1664,),
    "transformer.visual.transformer.resblocks.47.ln_2.weight": (1664,),
    "transformer.visual.transformer.resblocks.0.attn.in_proj.weight": (4992, 1664),
    "transformer.visual.transformer.resblocks.0.attn.in_proj.bias": (4992,),
    "transformer.visual.transformer.resblocks.0.attn.out_proj.weight": (1664, 1664),
    "transformer.visual.transformer.resblocks.0.mlp.c_fc.weight": (8192, 1664),
    "transformer.visual.transformer.resblocks.0.mlp.c_fc.bias": (8192,),
    "transformer.visual.transformer.resblocks.0.mlp.c_proj.weight": (1664, 8192),
    "transformer.visual.attn_pool.query": (256, 4096),
    "transformer.visual.attn_pool.pos_embed": (256, 4096),
    "transformer.visual.attn_pool.kv_proj.weight": (4096, 1664),
    "transformer.visual.attn_pool.ln_q.weight": (4096,),
    "transformer.visual.attn_pool.ln_kv.bias": (4096,),
    "transformer.visual.attn_pool.attn.in_proj_weight": (12_288, 4096),
    "transformer.visual.attn_pool.attn.in_proj_bias": (12_288,),
    "transformer.visual.attn_pool.attn.out_proj.weight": (4096, 4096),
    "transformer.visual.ln_post.weight": (4096,),
    "transformer.visual.proj": (4096, 4096),
}


def parameters(shapes) -> int:
    return sum(map(prod, shapes.values()))


def test_totals_are_those_of_the_released_models():
    shapes = hub_shapes(CONFIG)
    assert (len(shapes), parameters(shapes)) == (853, TOTAL)
    assert 2 * TOTAL == 19_313_870_336  # total_size of the index
    assert {name: shapes[name] for name in SHAPES} == SHAPES
    vision = {name: shape for name, shape in shapes.items() if name.startswith(VISION)}
    assert parameters(vision) == 1_935_610_624
    layers = {n: s for n, s in vision.items() if not n.startswith((f"{VISION}attn_pool.",
              f"{VISION}ln_post.", f"{VISION}proj"))}  # fmt: skip
    assert parameters(layers) == 1_842_770_688


def test_a_model_without_values_has_these_tensors():
    with shapes_only():
        model = QwenVLForConditionalGeneration(CONFIG)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == hub_shapes(CONFIG)
    assert sum(p.numel() for p in model.parameters()) == TOTAL
    text = model.weight_names(text_only=True)
    assert parameters({name: found[name] for name in text}) == 7_721_324_544
    parts = model.linear_parts()
    assert sorted(set(parts.values())) == ["head", "text", "vision"]
    assert sum(part == "text" for part in parts.values()) == 32 * 5
    assert sum(part == "vision" for part in parts.values()) == 48 * 4 + 2
    assert not any(isinstance(p, torch.Tensor) and not p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "found", "chat_format"),
    [
        ("qwenvl", "Qwen-VL-Chat", "instruct"),
        ("qwen-vl-chat", "Qwen-VL-Chat", "instruct"),
        ("Qwen/Qwen-VL", "Qwen-VL", "base"),
    ],
)
def test_the_known_models_have_this_configuration(name, found, chat_format):
    spec = find_spec(name)
    assert spec is not None
    assert (spec.name, spec.chat_format, spec.parameters) == (found, chat_format, TOTAL)
    assert spec.config == CONFIG
    assert answering_sibling(spec) == ("qwenvl-chat" if chat_format == "base" else "")


def test_sizes_are_those_of_the_cache_and_of_the_weights():
    sizes = footprint(CONFIG)
    assert sizes.parameters == TOTAL
    assert 2 * sizes.cache_per_token == 512 * 1024
    assert 2 * sizes.cache_per_token * sizes.largest_picture.positions == 129 * 2**20
    assert sizes.picture_numbers(sizes.largest_picture) == 256 * 4096
    assert {part.name: part.parameters for part in sizes.parts} == {
        "token embedding": 151_936 * 4096,
        "decoder": 7_721_324_544 - 2 * 151_936 * 4096 - 4096,
        "head": 151_936 * 4096 + 4096,
        "patches and resampler": 1_935_610_624 - 48 * 38_361_728,
        "vision encoder": 48 * 38_361_728,
    }


def test_what_older_writers_saved_beside_is_passed_over():
    assert hub_name("transformer.rotary_emb.inv_freq") is None
    assert hub_name("transformer.h.3.attn.masked_bias") is None
    assert hub_name("transformer.h.3.attn.c_attn.bias") is not None


def test_a_download_takes_the_files_that_are_read():
    repository = [
        *(f"pytorch_model-{n:05}-of-00010.bin" for n in range(1, 11)),
        "pytorch_model.bin.index.json", "config.json", "generation_config.json", "qwen.tiktoken",
        "tokenizer_config.json", "LICENSE", "NOTICE.md", "SimSun.ttf", "modeling_qwen.py",
        "visual.py", "assets/demo.jpeg", "README.md",
    ]  # fmt: skip
    files = [HubFile(name, 1, "0" * 40) for name in repository]
    chosen = {file.path for file in select(files, "Qwen/Qwen-VL-Chat")}
    left = {
        "NOTICE.md",
        "SimSun.ttf",
        "modeling_qwen.py",
        "visual.py",
        "assets/demo.jpeg",
        "README.md",
    }
    assert chosen == set(repository) - left
