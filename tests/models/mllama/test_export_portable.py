"""The programs without side effects, called as plain PyTorch; tests/export lowers them."""

import pytest
import torch

from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.models.base import ExportLimits
from mmchat.models.mllama import export_portable
from mmchat.models.mllama.export_portable import ExportedModel, export_programs
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, CONFIG, IMAGE, TOLERANCE, distance, picture

LIMITS = ExportLimits(max_seq_len=300, max_images=3)
STEPS = 3
ONE_ROW = [name for name, rows in CASES.items() if len(rows) == 1]


@pytest.fixture(scope="module")
def model():
    return oracle.build(oracle.random_weights())


@pytest.fixture
def exported(model):
    """The model that calls the programs, and the names and text lengths of those calls."""
    programs = {program.name: program for program in export_programs(model, LIMITS)}

    def run(name, tensors):
        program, rest = programs[name], list(tensors)
        arguments = [
            [rest.pop(0) for _ in example] if isinstance(example, list) else rest.pop(0)
            for example in program.args
        ]
        assert not rest
        called.append((name, tensors[0].shape[1]))
        before = [tensor.clone() for tensor in tensors]
        out = program.module(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        return out

    called = []
    return ExportedModel(CONFIG, LIMITS, torch.device("cpu"), torch.float32, run), called


@pytest.mark.parametrize("case", ONE_ROW)
def test_programs_without_side_effects_give_the_models_logits(case, model, exported):
    [row] = CASES[case]
    expected = oracle.run(model, [row], STEPS)
    portable, called = exported
    cache = portable.new_cache(1, 8)
    got = [portable.prefill(oracle.inputs_of([row]), cache)]
    for step in range(STEPS - 1):
        got.append(portable.decode(expected.tokens[:, step : step + 1], cache))
    assert distance(torch.stack(got, dim=1), expected.steps) < TOLERANCE
    assert called[1 - STEPS :] == [("read", 1)] * (STEPS - 1)


@pytest.mark.parametrize("case", ["B_three_pictures", "C_adjacent_then_apart", "E_picture_first"])
def test_any_cut_of_a_prefill_gives_the_same_logits(case, model, exported):
    [(ids, pictures)] = CASES[case]
    expected = oracle.run(model, [(ids, pictures)], 1).steps[:, 0]
    portable, _ = exported
    for cut in range(1, len(ids)):
        cache, count = portable.new_cache(1, 8), ids[:cut].count(IMAGE)
        portable.prefill(oracle.inputs_of([(ids[:cut], pictures[:count])]), cache)
        second = oracle.inputs_of([(ids[cut:], pictures[count:])], start=cut)
        assert distance(portable.prefill(second, cache), expected) < TOLERANCE, cut


def test_a_long_text_is_read_in_pieces_and_the_cache_grows(model, exported):
    portable, called = exported
    ids = [int(i) for i in torch.randint(1, 200, (LIMITS.max_seq_len,))]
    whole = oracle.run(model, [(ids, [])], 1).steps[:, 0]
    cache = portable.new_cache(1, 8)
    assert cache.capacity == 256
    assert distance(portable.prefill(oracle.inputs_of([(ids, [])]), cache), whole) < TOLERANCE
    assert [length for _, length in called] == [128, 128, 44]
    assert cache.capacity == 512
    with pytest.raises(ContextLengthExceeded, match="exported for 300; export it again"):
        portable.decode(torch.tensor([[1]]), cache)


@pytest.mark.parametrize("case", ["D_text_only", "C_adjacent_then_apart"])
def test_a_draft_is_verified_in_pieces_as_the_model_does(case, model, exported, monkeypatch):
    monkeypatch.setattr(export_portable, "MOST_WANTED", 2)
    [row] = CASES[case]
    draft = torch.tensor([[61, 7, 120]])
    logits = []
    for runs in (model, exported[0]):
        cache = runs.new_cache(1, 8)
        runs.prefill(oracle.inputs_of([row]), cache)
        logits.append(runs.verify(draft, cache))
        cache.truncate(len(row[0]) + 2)
        logits.append(runs.verify(draft[:, :1], cache))
    assert distance(logits[0], logits[2]) < TOLERANCE
    assert distance(logits[1], logits[3]) < TOLERANCE
    assert [length for _, length in exported[1][-3:]] == [2, 1, 1]


def test_a_turn_that_is_taken_back_leaves_no_trace(model, exported):
    portable, called = exported
    cache = portable.new_cache(1, 8)
    first = ([1, 8, IMAGE, 17, 33], [picture((1, 3))])
    portable.prefill(oracle.inputs_of([first]), cache)
    unwanted = ([44, IMAGE, 3, 12], [picture((2, 1))])
    portable.prefill(oracle.inputs_of([unwanted], start=5), cache)
    portable.decode(torch.tensor([[61]]), cache)
    cache.truncate(5)
    got = portable.prefill(oracle.inputs_of([([90, 3], [])], start=5), cache)
    fresh = oracle.run(model, [([*first[0], 90, 3], first[1])], 1)
    assert distance(got, fresh.steps[:, 0]) < TOLERANCE
    assert sum(name.startswith("vision") for name, _ in called) == 2


def test_more_pictures_than_exported_for_are_refused(exported):
    portable, _ = exported
    row = ([1, *[IMAGE] * 4, 5], [picture((1, 1), seed) for seed in range(4)])
    with pytest.raises(ExportError, match=r"4 pictures .* exported for 3; .* --max-images"):
        portable.prefill(oracle.inputs_of([row]), portable.new_cache(1, 8))


def test_every_program_gives_its_examples_shapes(model):
    for program in export_programs(model, LIMITS):
        out = program.module(*program.args)
        assert all(torch.isfinite(tensor).all() for tensor in out)
