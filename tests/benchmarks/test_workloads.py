"""Small models of random weights, measured and compared as the large ones are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import transformers_mllama
from benchmarks.agreement import DisagreementError
from benchmarks.contestants import Mmchat, tiled
from benchmarks.entrants import bits_of, contestant
from benchmarks.shapes import RandomTensors, Shapes, byte_tokenizer, shaped_spec
from benchmarks.traffic import decode_bytes
from benchmarks.turns import QUESTIONS, WORDS, two_turns
from benchmarks.workloads import Field, Workload
from mmchat.bench.pictures import picture_file, picture_of
from mmchat.bench.run import Variant
from mmchat.catalog.known import find_spec
from mmchat.errors import MissingExtra, UsageError
from mmchat.images import load_image

CPU = torch.device("cpu")
WORKLOADS = [
    Workload("decode", 12),
    Workload("decode", 12, 4),
    Workload("decode", 12, 2),
    Workload("decode", 12, 4, rows=3),
    Workload("prefill", 9),
    Workload("picture", 0, 1),
    Workload("picture", 0, 2),
    Workload("picture", 0, 4),
]


@pytest.fixture(scope="module")
def spec():
    return shaped_spec(Shapes("tiny"), CPU)


@pytest.fixture(scope="module")
def tensors(spec):
    return RandomTensors(spec, 0, torch.float32, CPU, keep=True)


@pytest.fixture(scope="module")
def theirs(spec, tensors):
    return transformers_mllama.build(spec, tensors.read, list(tensors.shapes), torch.float32, CPU)


@pytest.fixture(scope="module")
def ours(spec, tensors):
    return Mmchat("ours", contestant(spec, tensors, Variant()).loaded)


def field(*contestants, limit=1e-4):
    limits = {c.name: limit for c in contestants[1:]}
    mine = next(c for c in contestants if isinstance(c, Mmchat))
    return Field(contestants, limits, mine, rounds=2, seconds=60)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.title)
def test_transformers_with_the_same_tensors_agrees(ours, theirs, workload):
    measured = field(theirs, ours).measure(workload)
    assert measured.agreements["ours"].relative_error < 1e-5
    assert measured.agreements["ours"].top1
    assert len(measured.rounds.rounds) == 2
    assert all(t > 0 for t in measured.rounds.seconds(theirs.name, "total", "wall"))


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("language_model.model.layers.1.cross_attn_attn_gate", Workload("decode", 12, 4)),
        ("vision_model.global_transformer.layers.0.gate_ffn", Workload("picture", 0, 4)),
        ("language_model.model.layers.2.self_attn.o_proj.weight", Workload("prefill", 9)),
    ],
)
def test_one_changed_weight_is_caught_before_anything_is_timed(spec, theirs, name, workload):
    damaged = RandomTensors(spec, 0, torch.float32, CPU, keep=False)
    read = damaged.read
    damaged.read = lambda wanted: read(wanted) * (1.5 if wanted == name else 1.0)
    wrong = Mmchat("wrong", contestant(spec, damaged, Variant()).loaded)
    with pytest.raises(DisagreementError, match="nothing was timed"):
        field(theirs, wrong).measure(workload)


def test_transformers_holds_the_same_memory(ours, theirs):
    assert (
        theirs.model.lm_head.weight.data_ptr()
        == ours.loaded.runtime.model.language_model.lm_head.weight.data_ptr()
    )


def test_vision_and_cross_attention_are_told_apart(ours, theirs):
    rounds = field(theirs, ours).measure(Workload("picture", 0, 4)).rounds
    assert rounds.stages("ours") == ("vision", "prefill", "total", "cross_key_values")
    assert rounds.stages(theirs.name) == ("vision", "prefill", "total")


def test_the_second_turn_reads_no_picture_again(ours, monkeypatch):
    encoded = []
    encode = ours.loaded.runtime.encode
    monkeypatch.setattr(
        ours.loaded.runtime, "encode", lambda *given: encoded.append(given) or encode(*given)
    )
    times = two_turns(ours, 4, seed=3)
    assert list(times) == ["preprocessing", "first turn", "second turn"]
    assert len(encoded) == 1


def test_a_turn_has_as_many_tokens_as_with_llamas_tokenizer():
    tokenizer = byte_tokenizer(128_256, WORDS)
    assert [len(tokenizer.encode(question)) for question in QUESTIONS] == [6, 6]
    assert [len(tokenizer.encode(text)) for text in ("user", "assistant", "\n\n")] == [1, 1, 1]


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_a_drawn_picture_takes_the_tiles_that_were_asked_for(ours, tiles):
    drawn = load_image(picture_of(ours.loaded.spec, tiles, seed=tiles))
    image = tiled(ours.loaded.processor, drawn)
    assert len(image.tensors[0]) == tiles


def test_every_round_has_another_picture():
    assert picture_file(20, 20, 1) == picture_file(20, 20, 1) != picture_file(20, 20, 2)


def test_bytes_of_a_token_leave_out_what_it_does_not_read(spec, ours):
    text = spec.config.text_config
    wide, inner = text.hidden_size, text.intermediate_size
    keys = text.num_key_value_heads * text.head_dim
    block = 2 * wide * wide + 3 * wide * inner + 2 * wide
    own, cross = len(text.self_attention_layers), len(text.cross_attention_layers)
    plain = own * (block + 2 * wide * keys) + text.vocab_size * wide + wide
    assert decode_bytes(ours.loaded, 10, 0) == 4 * (plain + 10 * own * 2 * keys)
    tile = spec.config.vision_config.tokens_per_tile
    seen = cross * (block + 2 * text.head_dim + 2 + 2 * 4 * tile * keys)
    assert decode_bytes(ours.loaded, 10, 4) == 4 * (plain + 10 * own * 2 * keys + seen)


def test_without_transformers_the_extra_is_named(spec, tensors, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmchat\[bench\]'"):
        transformers_mllama.build(spec, tensors.read, list(tensors.shapes), torch.float32, CPU)


def test_another_family_cannot_be_compared(spec, tensors):
    other = replace(spec, config=SimpleNamespace(vocab_size=7, max_position_embeddings=9))
    with pytest.raises(UsageError, match="the benchmarks are of Mllama"):
        transformers_mllama.build(other, tensors.read, [], torch.float32, CPU)


def test_depth_is_full_on_a_gpu_and_small_on_a_cpu():
    on_gpu = shaped_spec(Shapes("11B"), torch.device("cuda"))
    assert on_gpu.config == find_spec("llama3.2-11B").config
    on_cpu = shaped_spec(Shapes("11b"), CPU)
    assert on_cpu.config.text_config.num_hidden_layers == 5
    assert 2.2e9 < on_cpu.parameters < 2.4e9


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (Shapes("12B"), "no shapes '12B'; use 11B, 90B"),
        (Shapes("11B", layers=1), "text layers must be 2 to 40"),
        (Shapes("11B", vision_layers=2), "vision layers must be 3 to 40"),
    ],
)
def test_impossible_shapes_are_refused(shapes, message):
    with pytest.raises(UsageError, match=message):
        shaped_spec(shapes, CPU)


@pytest.mark.parametrize(
    ("scheme", "bits"), [("none", None), ("int8", 8), ("int4-g32", 4), ("fp8", 8)]
)
def test_the_allowed_error_is_that_of_the_bits(scheme, bits):
    assert bits_of(scheme) == bits
