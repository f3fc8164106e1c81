"""The programs are traced and run here without a compiler; tests/export compiles them."""

import pytest
import torch

from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.export.aoti import trace
from mmchat.models.base import ExportLimits
from mmchat.models.mllama.export import ExportedModel, export_programs
from mmchat.models.mllama.export_parts import capacity
from tests.models.mllama import exported as checks
from tests.models.mllama import oracle
from tests.models.mllama.oracle import CASES, CONFIG, IMAGE, TOLERANCE, distance, picture

pytestmark = pytest.mark.slow  # tracing takes half a minute

LIMITS = ExportLimits(max_seq_len=255, max_images=3)  # 255: the cache has the fewest to spare
STEPS = 3


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
        out = graph(*checks.grouped(program, tensors))
        return [out] if isinstance(out, torch.Tensor) else out

    called = []
    device = torch.device("cpu")
    return ExportedModel(CONFIG, LIMITS, device, torch.float32, run), called


@pytest.mark.parametrize("case", checks.ONE_ROW)
def test_traced_programs_give_the_models_logits(case, model, exported):
    traced, called = exported
    checks.check_logits(traced, model, case, STEPS)
    kind = [] if CASES[case][0][1] else ["_text"]
    assert called[-STEPS:] == ["".join((n, *kind)) for n in ("prefill", "decode", "decode")]


@pytest.mark.parametrize("case", ["D_text_only", "C_adjacent_then_apart"])
def test_a_draft_is_verified_as_the_model_does(case, model, exported):
    checks.check_draft(exported[0], model, case)


@pytest.mark.parametrize("case", ["B_three_pictures", "C_adjacent_then_apart", "E_picture_first"])
def test_any_cut_of_a_prefill_gives_the_same_logits(case, model, exported):
    checks.check_any_cut_of_a_prefill(exported[0], model, case)


def test_a_turn_that_is_taken_back_leaves_no_trace(model, exported):
    traced, called = exported
    checks.check_a_turn_taken_back(traced, model, lambda: called.count("vision"))


def test_the_last_position_of_the_context_can_be_read(model, exported):
    traced, _ = exported
    ids = [int(i) for i in torch.randint(1, 200, (LIMITS.max_seq_len,))]
    reader = oracle.Reader(traced)
    reader.prefill((ids[:-1], []))
    got = reader.decode(torch.tensor([ids[-1:]]))
    whole = oracle.run(model, [(ids, [])], 1).steps[:, 0]
    assert distance(got, whole) < TOLERANCE
    reader.truncate(0)
    assert distance(reader.prefill((ids, [])), whole) < TOLERANCE
    with pytest.raises(ContextLengthExceeded, match="exported for 255; export it again"):
        reader.decode(torch.tensor([[1]]))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 4096])
def test_static_caches_have_a_position_to_spare(length):
    assert length < capacity(length) <= length + 256


def test_giving_memory_back_leaves_static_caches_as_the_programs_want_them(model, exported):
    reader = oracle.Reader(exported[0])
    reader.prefill(([1, 2, 3], []))
    reader.cache.release()
    reader.cache.free(0)
    whole = oracle.run(model, [([4, 5, 6], [])], 1).steps[:, 0]
    assert distance(reader.prefill(([4, 5, 6], [])), whole) < TOLERANCE
    assert reader.cache.layers[0].capacity(0) == capacity(LIMITS.max_seq_len)


def test_more_pictures_than_exported_for_are_refused(exported):
    checks.check_more_pictures_are_refused(exported[0], [1, *[IMAGE, 5] * 4])


def test_pictures_out_of_sight_do_not_count(model, exported):
    traced, _ = exported
    reader = oracle.Reader(traced)
    pictures = [picture((1, 1), seed) for seed in range(5)]
    for image in pictures:
        reader.prefill(([IMAGE, 5, 9], [image]))
    got = reader.decode(torch.tensor([[7]]))
    whole = ([*[IMAGE, 5, 9] * 5, 7], pictures)
    assert distance(got, oracle.run(model, [whole], 1).steps[:, 0]) < TOLERANCE


def test_tables_filled_for_tiles_that_a_canvas_lacks_are_in_the_programs():
    model = oracle.build(oracle.random_weights(fill_unused_tiles=True))
    programs = {program.name: program for program in export_programs(model, LIMITS)}
    traced = {name: trace(programs[name]).module() for name in ("vision", "vision_full")}
    for canvas in oracle.CANVASES:
        image = picture(canvas)
        arguments = image.tensors[0][None], image.tensors[1]
        name = "vision_full" if len(image.tensors[0]) == 4 else "vision"
        with torch.inference_mode():
            pairs = model.cross_key_values(model.vision_states(*arguments))
            for found, expected in zip(traced[name](*arguments), sum(pairs, ()), strict=True):
                assert distance(found, expected) < TOLERANCE, canvas


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
