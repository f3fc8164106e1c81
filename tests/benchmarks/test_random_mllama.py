"""The random model of true widths that speed is measured on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import random_mllama
from benchmarks.in_memory import InMemoryCheckpoint
from benchmarks.shapes import RandomTensors, byte_tokenizer
from mmchat.catalog.known import find_spec
from mmchat.errors import CheckpointError
from mmchat.loading.loader import load_from_tensors
from mmchat.loading.options import LoadOptions
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from tests.models.mllama.oracle import Reader


def tensors(seed: int = 0, *, keep: bool = True) -> RandomTensors:
    return RandomTensors(find_spec("tiny"), seed, torch.float32, torch.device("cpu"), keep=keep)


def load(given):
    spec = find_spec("tiny")
    tokenizer = byte_tokenizer(spec.config.text_config.vocab_size)
    return load_from_tensors(spec, given, tokenizer, LoadOptions(device="cpu"))


@pytest.mark.parametrize("name", ["llama3.2-11B", "llama3.2-90B", "tiny"])
def test_all_layers_leave_the_configuration_as_it_is(name):
    config = find_spec(name).config
    assert random_mllama.with_depth(config, *random_mllama.depth(config)) == config


@pytest.mark.parametrize("name", ["llama3.2-11B", "llama3.2-90B"])
def test_few_layers_keep_every_width_and_one_cross_attention_layer(name):
    full = find_spec(name).config
    config = random_mllama.with_depth(full, 5, 3)
    assert config.text_config.cross_attention_layers == (3,)
    assert random_mllama.depth(config) == (5, 3)
    assert config.vision_config.output_dim == full.vision_config.output_dim == 7680
    assert config.vision_config.intermediate_layers_indices == (1, 1, 1, 1, 1)
    shapes = {
        name.replace(".0.", ".N.") for name in find_spec("llama3.2-11B").family.shapes(config)
    }
    assert "vision_model.global_transformer.layers.N.gate_ffn" in shapes


@pytest.mark.parametrize(("layers", "vision"), [(1, 3), (5, 2), (41, 3), (5, 41)])
def test_impossible_depths_are_refused(layers, vision):
    with pytest.raises(ValueError, match="layers must be"):
        random_mllama.with_depth(find_spec("llama3.2-11B").config, layers, vision)


def test_a_tensor_depends_on_its_name_and_the_seed_alone():
    config = find_spec("tiny").config
    name = "language_model.model.layers.0.mlp.up_proj.weight"

    def make(name, seed):
        return random_mllama.random_tensor(config, name, (64, 32), seed, torch.float32)

    assert torch.equal(make(name, 0), make(name, 0))
    assert not torch.equal(make(name, 0), make(name, 1))
    assert not torch.equal(make(name, 0), make(name.replace("up", "down"), 0))
    assert abs(float(make(name, 0).std()) - 0.02) < 0.002


def test_norms_are_one_and_gates_are_open():
    given = tensors()
    for name in given.shapes:
        value = given.read(name)
        if "gate" in name.rsplit(".", 1)[-1]:
            assert 0.1 <= float(value.min()) <= float(value.max()) <= 0.5, name
        elif "norm" in name and name.endswith("weight"):
            assert bool((value == 1).all()), name
        else:
            assert float(value.std()) > 0, name


def test_threads_do_not_change_the_numbers(monkeypatch):
    monkeypatch.setattr(random_mllama, "_CHUNK", 100)
    out = torch.empty(2, 1050)
    for row, threads in zip(out, (1, 4), strict=True):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        random_mllama._fill_normal(row, "7")
    assert torch.equal(out[0], out[1])
    assert len(out[0].unique()) > 1000


def test_a_loaded_model_shares_the_tensors():
    given = tensors()
    loaded = load(given.checkpoint())
    assert (
        loaded.runtime.model.language_model.lm_head.weight.data_ptr()
        == given.read("language_model.lm_head.weight").data_ptr()
    )


def test_a_missing_tensor_is_named():
    given = tensors()
    shapes = {n: s for n, s in given.shapes.items() if n != "multi_modal_projector.bias"}
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.bias"):
        load(InMemoryCheckpoint(shapes, "float32", given.read))


def test_a_wrong_shape_is_named():
    given = tensors()
    shapes = {**given.shapes, "multi_modal_projector.bias": (3,)}
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.bias.*expected \[256\]"):
        load(InMemoryCheckpoint(shapes, "float32", given.read))


def test_intermediate_states_may_be_taken_twice():
    config = find_spec("tiny").config
    vision = dataclasses.replace(config.vision_config, intermediate_layers_indices=(3, 1, 3))
    changed = dataclasses.replace(config, vision_config=vision)
    tower = MllamaForConditionalGeneration(changed).vision_model.eval()
    side, width = vision.image_size, vision.hidden_size
    with torch.inference_mode():
        for parameter in tower.parameters():  # some are not filled when they are made
            parameter.normal_(0, 0.02)
        features = tower(torch.randn(1, 1, 3, side, side), torch.tensor([1]))
    states = features[..., width:].unflatten(-1, (width, 3))
    assert torch.equal(states[..., 0], states[..., 2])
    assert not torch.equal(states[..., 0], states[..., 1])


def test_a_made_up_context_decodes_as_one_that_was_read():
    given = tensors()
    loaded = load(given.checkpoint())
    model, config = loaded.runtime.model, loaded.spec.config
    prompt = loaded.processor.raw(_message("The quick brown fox."))
    read, made = Reader(model), Reader(model)
    read.prefill((list(prompt.token_ids), []))
    length = len(prompt.token_ids)
    rows = (layer.row(0) for layer in read.cache.layers)
    kept = tuple((key[:, :, :length], value[:, :, :length]) for key, value in rows)
    random_mllama.fill_cache(made.cache, random_mllama.RandomContext(length, kept, None))
    token = torch.tensor([[65]])
    assert torch.equal(read.decode(token), made.decode(token))
    seen = random_mllama.random_context(config, 8, 2, torch.float32, torch.device("cpu"))
    cache = model.new_cache(1, 64)
    random_mllama.fill_cache(cache, seen)
    assert cache.lengths == [8]
    assert cache.seen_steps([0], [8])[0].key.shape[2] == 2 * 65


def _message(text):
    from mmchat.conversation import Message, Text

    return Message("user", (Text(text),))
