"""The programs without side effects, called as plain PyTorch; tests/export lowers them."""

import pytest
import torch

from mmchat.errors import ContextLengthExceeded
from mmchat.models.base import ExportLimits
from mmchat.models.mllama import export_portable
from mmchat.models.mllama.export_portable import ExportedModel, export_programs
from tests.models.mllama import exported as checks
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CONFIG, IMAGE, TOLERANCE, distance

LIMITS = ExportLimits(max_seq_len=300, max_images=3)
STEPS = 3


@pytest.fixture(scope="module")
def model():
    return oracle.build(oracle.random_weights())


@pytest.fixture
def exported(model):
    """The model that calls the programs, and the names and text lengths of those calls."""
    programs = {program.name: program for program in export_programs(model, LIMITS)}

    def run(name, tensors):
        called.append((name, tensors[0].shape[1]))
        before = [tensor.clone() for tensor in tensors]
        out = programs[name].module(*checks.grouped(programs[name], tensors))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        return out

    called = []
    return ExportedModel(CONFIG, LIMITS, torch.device("cpu"), torch.float32, run), called


@pytest.mark.parametrize("case", checks.ONE_ROW)
def test_programs_without_side_effects_give_the_models_logits(case, model, exported):
    portable, called = exported
    checks.check_logits(portable, model, case, STEPS)
    assert called[1 - STEPS :] == [("read", 1)] * (STEPS - 1)


@pytest.mark.parametrize("case", ["B_three_pictures", "C_adjacent_then_apart", "E_picture_first"])
def test_any_cut_of_a_prefill_gives_the_same_logits(case, model, exported):
    checks.check_any_cut_of_a_prefill(exported[0], model, case)


def test_a_long_text_is_read_in_pieces_and_the_cache_grows(model, exported):
    portable, called = exported
    ids = [int(i) for i in torch.randint(1, 200, (LIMITS.max_seq_len,))]
    whole = oracle.run(model, [(ids, [])], 1).steps[:, 0]
    reader = oracle.Reader(portable)
    [first, *_] = reader.cache.layers
    assert first.capacity(0) == 256
    assert distance(reader.prefill((ids, [])), whole) < TOLERANCE
    assert [length for _, length in called] == [128, 128, 44]
    assert first.capacity(0) == 512
    with pytest.raises(ContextLengthExceeded, match="exported for 300; export it again"):
        reader.decode(torch.tensor([[1]]))


@pytest.mark.parametrize("case", ["D_text_only", "C_adjacent_then_apart"])
def test_a_draft_is_verified_in_pieces_as_the_model_does(case, model, exported, monkeypatch):
    monkeypatch.setattr(export_portable, "MOST_WANTED", 2)
    checks.check_draft(exported[0], model, case)
    assert [length for _, length in exported[1][-3:]] == [2, 1, 1]


def test_a_turn_that_is_taken_back_leaves_no_trace(model, exported):
    portable, called = exported
    encoded = lambda: sum(name.startswith("vision") for name, _ in called)  # noqa: E731
    checks.check_a_turn_taken_back(portable, model, encoded)


def test_more_pictures_than_exported_for_are_refused(exported):
    checks.check_more_pictures_are_refused(exported[0], [1, *[IMAGE] * 4, 5])


def test_every_program_gives_its_examples_shapes(model):
    text, vision = CONFIG.text_config, CONFIG.vision_config
    heads = (1, text.num_key_value_heads)
    for program in export_programs(model, LIMITS):
        out = program.module(*program.args)
        assert all(torch.isfinite(tensor).all() for tensor in out)
        shapes = [tuple(tensor.shape) for tensor in out]
        if program.name == "read":
            ids, _, wanted, _, cached, _ = program.args
            fresh = (*heads, ids.shape[1], text.head_dim)
            assert shapes == [(1, len(wanted), text.vocab_size), *[fresh] * len(cached)]
        else:
            tokens = program.args[0].shape[1] * vision.tokens_per_tile
            layers = len(text.cross_attention_layers)
            assert shapes == [(*heads, tokens, text.head_dim)] * (2 * layers)


@pytest.mark.parametrize("length", [64, 255, 256])
def test_a_short_context_can_be_exported(model, length):
    assert export_programs(model, ExportLimits(max_seq_len=length, max_images=1))
