"""The programs are traced and run here without a compiler; tests/export compiles them."""

import pytest
import torch

from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.export.aoti import trace
from mmchat.models.base import ExportLimits
from mmchat.models.mllama.export import ExportedModel, capacity, export_programs
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, CONFIG, IMAGE, TOLERANCE, distance, picture

pytestmark = pytest.mark.slow  # tracing takes half a minute

LIMITS = ExportLimits(max_seq_len=255, max_images=3)  # 255: the cache has the fewest to spare
STEPS = 3
ONE_ROW = [name for name, rows in CASES.items() if len(rows) == 1]


@pytest.fixture(scope="module")
def model():
    return oracle.build(oracle.random_weights())


@pytest.fixture(scope="module")
def programs(model):
    traced = {program.name: (program, trace(program)) for program in export_programs(model, LIMITS)}
    return {name: (program, graph, graph.module()) for name, (program, graph) in traced.items()}


@pytest.fixture
def exported(programs):
    """The model that calls the traced graphs, and the names of those that were called."""

    def run(name, tensors):
        called.append(name)
        program, _, graph = programs[name]
        rest = list(tensors)
        arguments = [
            [rest.pop(0) for _ in example] if isinstance(example, list) else rest.pop(0)
            for example in program.args
        ]
        assert not rest
        out = graph(*arguments)
        return [out] if isinstance(out, torch.Tensor) else out

    called = []
    device = torch.device("cpu")
    return ExportedModel(CONFIG, LIMITS, device, torch.float32, run), called


@pytest.mark.parametrize("case", ONE_ROW)
def test_traced_programs_give_the_models_logits(case, model, exported):
    [row] = CASES[case]
    expected = oracle.run(model, [row], STEPS)
    traced, called = exported
    cache = traced.new_cache(1, 8)
    got = [traced.prefill(oracle.inputs_of([row]), cache)]
    for step in range(STEPS - 1):
        got.append(traced.decode(expected.tokens[:, step : step + 1], cache))
    assert distance(torch.stack(got, dim=1), expected.steps) < TOLERANCE
    kind = [] if row[1] else ["_text"]
    assert called[-STEPS:] == ["".join((n, *kind)) for n in ("prefill", "decode", "decode")]


@pytest.mark.parametrize("case", ["D_text_only", "C_adjacent_then_apart"])
def test_a_draft_is_verified_as_the_model_does(case, model, exported):
    [row] = CASES[case]
    draft = torch.tensor([[61, 7, 120]])
    logits = []
    for runs in (model, exported[0]):
        cache = runs.new_cache(1, 8)
        runs.prefill(oracle.inputs_of([row]), cache)
        logits.append(runs.verify(draft, cache))
        cache.truncate(len(row[0]) + 2)
        logits.append(runs.verify(draft[:, :1], cache))
    assert logits[0].shape == (1, 3, CONFIG.text_config.vocab_size)
    assert distance(logits[0], logits[2]) < TOLERANCE
    assert distance(logits[1], logits[3]) < TOLERANCE


@pytest.mark.parametrize("case", ["B_three_pictures", "C_adjacent_then_apart", "E_picture_first"])
def test_any_cut_of_a_prefill_gives_the_same_logits(case, model, exported):
    [(ids, pictures)] = CASES[case]
    expected = oracle.run(model, [(ids, pictures)], 1).steps[:, 0]
    traced, _ = exported
    for cut in range(1, len(ids)):
        cache, count = traced.new_cache(1, 8), ids[:cut].count(IMAGE)
        traced.prefill(oracle.inputs_of([(ids[:cut], pictures[:count])]), cache)
        second = oracle.inputs_of([(ids[cut:], pictures[count:])], start=cut)
        assert distance(traced.prefill(second, cache), expected) < TOLERANCE, cut


def test_a_turn_that_is_taken_back_leaves_no_trace(model, exported):
    traced, called = exported
    cache = traced.new_cache(1, 8)
    first = ([1, 8, IMAGE, 17, 33], [picture((1, 3))])
    traced.prefill(oracle.inputs_of([first]), cache)
    unwanted = ([44, IMAGE, 3, 12], [picture((2, 1))])
    traced.prefill(oracle.inputs_of([unwanted], start=5), cache)
    traced.decode(torch.tensor([[61]]), cache)
    cache.truncate(5)
    got = traced.prefill(oracle.inputs_of([([90, 3], [])], start=5), cache)
    fresh = oracle.run(model, [([*first[0], 90, 3], first[1])], 1)
    assert distance(got, fresh.steps[:, 0]) < TOLERANCE
    assert called.count("vision") == 2


def test_the_last_position_of_the_context_can_be_read(model, exported):
    traced, _ = exported
    ids = [int(i) for i in torch.randint(1, 200, (LIMITS.max_seq_len,))]
    cache = traced.new_cache(1, 8)
    traced.prefill(oracle.inputs_of([(ids[:-1], [])]), cache)
    got = traced.decode(torch.tensor([ids[-1:]]), cache)
    whole = oracle.run(model, [(ids, [])], 1).steps[:, 0]
    assert distance(got, whole) < TOLERANCE
    cache.truncate(0)
    assert distance(traced.prefill(oracle.inputs_of([(ids, [])]), cache), whole) < TOLERANCE
    with pytest.raises(ContextLengthExceeded, match="exported for 255; export it again"):
        traced.decode(torch.tensor([[1]]), cache)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 4096])
def test_static_caches_have_a_position_to_spare(length):
    assert length < capacity(length) <= length + 256


def test_more_pictures_than_exported_for_are_refused(exported):
    traced, _ = exported
    row = ([1, *[IMAGE, 5] * 4], [picture((1, 1), seed) for seed in range(4)])
    with pytest.raises(ExportError, match=r"4 pictures .* exported for 3; .* --max-images"):
        traced.prefill(oracle.inputs_of([row]), traced.new_cache(1, 8))


def test_pictures_out_of_sight_do_not_count(model, exported):
    traced, _ = exported
    cache = traced.new_cache(1, 8)
    pictures = [picture((1, 1), seed) for seed in range(5)]
    for turn, image in enumerate(pictures):
        traced.prefill(oracle.inputs_of([([IMAGE, 5, 9], [image])], start=3 * turn), cache)
    got = traced.decode(torch.tensor([[7]]), cache)
    whole = ([*[IMAGE, 5, 9] * 5, 7], pictures)
    assert distance(got, oracle.run(model, [whole], 1).steps[:, 0]) < TOLERANCE


def test_a_batch_is_refused(exported):
    with pytest.raises(ExportError, match="one conversation at a time, not 2"):
        exported[0].new_cache(2, 8)


def test_every_weight_is_found_by_the_models_own_name(model, programs):
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    used = set()
    for _, graph, _ in programs.values():
        names = {*graph.state_dict, *graph.constants}
        assert {name.removeprefix("model.") for name in names} <= own.keys()
        used |= {name.removeprefix("model.") for name in names}
    assert used == own.keys()


def test_decoding_has_one_shape_but_for_the_length_of_the_pictures(programs):
    for name in ("decode", "decode_text"):
        _, graph, _ = programs[name]
        free = [str(symbol) for symbol in graph.range_constraints]
        assert len(free) == (1 if name == "decode" else 0)
