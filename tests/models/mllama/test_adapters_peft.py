"""What mmchat merges is what peft's own merge_and_unload gives, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmchat.errors import CheckpointError
from mmchat.loading.loader import load
from mmchat.loading.options import LoadOptions
from mmchat.models.mllama.tensor_names import hf_shapes, hub_name
from tests.loading.test_loader import small_config, write_hf_folder
from tests.models.mllama.oracle import random_weights
from tests.models.mllama.transformers_mllama import build

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'mmchat[test]'")

CONFIG = small_config()
WEIGHTS = random_weights(CONFIG)
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|cross_attn|mlp|dense)"
    r".*?(?:q_proj|fc1|down_proj).*?)"
)
CASES = {
    "short list": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "all linear": {"target_modules": "all-linear", "r": 3},
    "regular expression": {"target_modules": UNSLOTH},
    "rslora and patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "use_rslora": True,
        "lora_alpha": 7,
        "rank_pattern": {"k_proj": 5, r"vision_model.*q_proj": 2},
        "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 40},
    },
    "dora": {"target_modules": ["q_proj", "fc2", "o_proj"], "use_dora": True},
    "whole modules": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["multi_modal_projector", "lm_head", "embed_tokens"],
    },
    "biases of its modules": {"target_modules": ["fc1", "q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["fc1"], "bias": "all"},
    "tables": {"target_modules": ["embed_tokens", "lm_head", "tile_embedding"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("base") / "random", CONFIG, WEIGHTS)


def trained(**settings):
    """A model of peft whose trained parameters are all random."""
    torch.manual_seed(7)
    model = build(WEIGHTS, ours=CONFIG)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    return model


def merged(model):
    """By the Hub's names."""
    return {hub_name(name): t for name, t in model.merge_and_unload().state_dict().items()}


def loaded(base, adapter, **options):
    return load(LoadOptions(base, adapter=adapter, device="cpu", **options)).runtime.model


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(tmp_path, base, case):
    model = trained(**CASES[case])
    model.save_pretrained(tmp_path)
    expected = merged(model)
    names = hf_shapes(CONFIG)
    assert sum(not torch.equal(expected[name], WEIGHTS[name]) for name in names) > 2
    for dtype in (torch.float32, torch.bfloat16):
        ours = loaded(base, tmp_path, dtype=dtype).state_dict()
        for name in names:
            assert torch.equal(ours[name], expected[name].to(dtype)), name


def test_two_adapters_as_peft_adds_them(tmp_path, base):
    model = trained(target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "other" in module.scaling:
            module.set_scale("other", 0.25)
    model.base_model.set_adapter(["default", "other"])
    expected = merged(model)
    ours = loaded(base, [tmp_path, f"{tmp_path / 'other'}:0.25"]).state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in hf_shapes(CONFIG))


def test_rounded_after_it_was_merged(tmp_path, base):
    model = trained(target_modules=["q_proj", "gate_proj"])
    model.save_pretrained(tmp_path / "adapter")
    plain = write_hf_folder(tmp_path / "plain", CONFIG, merged(model))
    ours = loaded(base, tmp_path / "adapter", quantize="int8").state_dict()
    expected = load(LoadOptions(plain, device="cpu", quantize="int8")).runtime.model.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_kinds_that_are_not_merged_are_named(tmp_path, base):
    model = trained(target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in (
        ("peft_type", "LOHA"),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("trainable_token_indices", [1]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("a setting of tomorrow", True),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=key):
            loaded(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(saved, tmp_path / "adapter_model.safetensors")
    loaded(base, tmp_path)


def test_convolutions_are_named(tmp_path, base):
    trained(target_modules=["patch_embedding"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not convolutions"):
        loaded(base, tmp_path)
