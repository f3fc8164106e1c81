"""Sizes that arithmetic gives, against the model itself."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmchat.catalog.known import known_specs
from mmchat.models.base import Batch
from mmchat.models.mllama.footprint import footprint
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.tiling import facts
from mmchat.models.row_cache import Place
from mmchat.nn import mlp
from tests.kinds import some
from tests.live_memory import LiveMemory

CONFIGS = {spec.name: spec.config for spec in known_specs() if spec.model_type == "mllama"}
INSTRUCT_11B = CONFIGS["Llama-3.2-11B-Vision-Instruct"]
INSTRUCT_90B = CONFIGS["Llama-3.2-90B-Vision-Instruct"]
FEW_LAYERS = {"num_hidden_layers": 5, "cross_attention_layers": (3,)}


def shortened(config):
    """The same widths with few layers: what a pass works in does not depend on their number."""
    vision = replace(
        config.vision_config,
        num_hidden_layers=6, num_global_layers=2, intermediate_layers_indices=(0, 1, 2, 3, 4),
    )  # fmt: skip
    return replace(
        config, vision_config=vision, text_config=replace(config.text_config, **FEW_LAYERS)
    )


def fake_model(config):
    with torch.device("cpu"):
        return MllamaForConditionalGeneration(config).requires_grad_(False).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_hold_every_parameter_once(name):
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(CONFIGS[name])
    sizes = footprint(CONFIGS[name])
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    counted = sorted(shape for part in sizes.parts for shape in part.linears)
    assert counted == sorted(tuple(m.weight.shape) for m in linear)


@pytest.mark.parametrize("text_only", [False, True])
def test_loaded_parts_are_the_weights_that_are_loaded(text_only):
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(INSTRUCT_11B)
    wanted = model.weight_names(text_only=text_only)
    loaded = sum(p.numel() for name, p in model.named_parameters() if name in wanted)
    parts = footprint(INSTRUCT_11B).loaded_parts(text_only=text_only)
    assert sum(part.parameters for part in parts) == loaded


@pytest.mark.parametrize(
    ("config", "text", "picture"),
    [(INSTRUCT_11B, 7.505e9, 9.182e9), (INSTRUCT_90B, 69.50e9, 86.28e9)],
)
def test_a_token_reads_the_text_layers_and_after_a_picture_those_of_cross_attention(
    config, text, picture
):
    sizes = footprint(config)
    for pictures, expected in ((False, text), (True, picture)):
        linears = sizes.token_linears(pictures=pictures)
        numbers = sum(rows * columns for _, rows, columns in linears)
        assert numbers + sizes.token_others(pictures=pictures) == pytest.approx(expected, rel=1e-3)


def test_caches_are_those_of_the_released_models():
    sizes = footprint(INSTRUCT_11B)
    assert 2 * sizes.cache_per_token == 131_072
    assert 2 * sizes.cache_per_tile == 32_768 * 1601
    assert 2 * footprint(INSTRUCT_90B).cache_per_token == 327_680


@pytest.mark.parametrize("tiles", some([1, 2, 3, 4], [4]))
@pytest.mark.parametrize("name", ["Llama-3.2-11B-Vision", "Llama-3.2-90B-Vision-Instruct", "tiny"])
def test_encoding_a_picture_works_in_what_the_formula_says(name, tiles, monkeypatch):
    monkeypatch.setattr(mlp, "PIECE", 10**6)  # whole, as on GPUs
    config = CONFIGS[name]
    config = config if name == "tiny" else shortened(config)
    side = config.vision_config.image_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config)
        pixels, ratio = torch.zeros(1, tiles, 3, side, side), torch.tensor([1])
        with torch.inference_mode(), LiveMemory([*model.parameters(), pixels]) as memory:
            model.cross_key_values(model.vision_states(pixels, ratio))
    keys_and_values = footprint(config).cache_per_tile * tiles * 4
    picture = facts(config, side, tiles * side)
    estimate = footprint(config).encode_bytes(picture, 4)
    # the formula leaves out the first keys and values, which are made before the peak can be over
    assert memory.peak <= estimate + keys_and_values
    assert estimate <= 1.05 * memory.peak


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("prompt", some([64, 2048], [2048]))
@pytest.mark.parametrize("config", [INSTRUCT_11B, INSTRUCT_90B])
def test_reading_a_prompt_works_in_what_the_formula_says(config, prompt, pictures):
    config = shortened(config)
    text = config.text_config
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config)
        cache = model.new_cache(1, prompt)
        kept = [t for layer in cache.layers for t in layer.row(0)]
        image = torch.zeros(2, 1, text.num_key_value_heads, 6404, text.head_dim)
        if pictures:
            cache.places[0] = (Place(0, 1, "picture"),)
            cache.keep_media("picture", [(image[0], image[1])])
        outside = [*model.parameters(), *model.buffers(), *kept, image]
        ids = torch.zeros(prompt, dtype=torch.long)
        with torch.inference_mode(), LiveMemory(outside) as memory:
            model(Batch.last_of(ids, 0), cache)
    estimate = footprint(config).prefill_bytes(prompt, 4, pictures=pictures)
    assert memory.peak <= estimate <= 1.1 * memory.peak
