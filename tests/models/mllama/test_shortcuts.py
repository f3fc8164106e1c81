"""The model's shortcuts against the plain form: all slots computed, dense masks, no cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from tests.kinds import some
from tests.models.mllama import oracle, plain_mllama
from tests.models.mllama.oracle import CANVASES, CASES, CONFIG, IMAGE, TOLERANCE, distance, picture

STEPS = 6


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def model(weights):
    return oracle.build(weights)


@pytest.fixture(scope="module")
def shallow():
    """A model to compile: two layers of every kind of the text, few of the pictures."""
    vision = replace(
        CONFIG.vision_config, num_hidden_layers=3, num_global_layers=1,
        intermediate_layers_indices=(0, 2),
    )  # fmt: skip
    text = replace(CONFIG.text_config, num_hidden_layers=4, cross_attention_layers=(1, 3))
    config = replace(CONFIG, vision_config=vision, text_config=text)
    return oracle.build(oracle.random_weights(config), config)


@pytest.fixture(scope="module")
def wide_weights(weights):
    return {name: value.double() for name, value in weights.items()}


def plain_logits(weights, ids, pictures) -> torch.Tensor:
    with torch.inference_mode():
        return plain_mllama.logits(weights, CONFIG, ids, pictures)


@pytest.fixture(scope="module", params=["zero", "filled"])
def unused_tiles(request):
    """Weights and model in float64, by what the tile tables hold for tiles a canvas lacks."""
    filled = request.param == "filled"
    weights = oracle.random_weights(fill_unused_tiles=filled)
    wide = {name: value.double() for name, value in weights.items()}
    model = oracle.build(wide, dtype=torch.float64)
    assert model.vision_model.padding_is_equal is not filled
    return wide, model


@pytest.mark.parametrize("canvas", CANVASES)
def test_padding_tiles_computed_once_or_one_by_one_are_exact(canvas, unused_tiles):
    wide_weights, model = unused_tiles
    images = [picture(canvas, seed=1), picture(canvas, seed=2)]
    tiles = torch.stack([image.tensors[0] for image in images])
    ratios = torch.tensor([image.tensors[1].item() for image in images])
    with torch.inference_mode():
        got = model.vision_model(tiles, ratios)
        for index, image in enumerate(images):
            pixels = image.tensors[0].double()
            plain = plain_mllama.vision_features(wide_weights, CONFIG, pixels, canvas)
            assert distance(got[index], plain.flatten(0, 1)) < 1e-11


@pytest.mark.parametrize("case", [*CASES, "NO_PICTURE_IN_ONE_ROW"])
def test_segments_and_cached_decoding_equal_one_masked_pass(case, model, wide_weights):
    rows = CASES.get(case, oracle.NO_PICTURE_IN_ONE_ROW)
    got = oracle.run(model, rows, STEPS)
    for row, (ids, pictures) in enumerate(rows):
        whole = [*ids, *got.tokens[row, :-1].tolist()]
        plain = plain_logits(wide_weights, whole, pictures)
        assert distance(got.prefill[row], plain[: len(ids)]) < TOLERANCE
        assert distance(got.steps[row], plain[len(ids) - 1 :]) < TOLERANCE


def in_chunks(model: MllamaForConditionalGeneration, row: oracle.Row, cuts: list[int]):
    """Prefill one row in pieces that end at `cuts`; logits [S, V] and the reader."""
    ids, pictures = row
    reader, logits, left = oracle.Reader(model), [], list(pictures)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        piece = ids[start:end]
        count = piece.count(IMAGE)
        logits += reader.read((piece, left[:count]))
        left = left[count:]
    return torch.cat(logits), reader


@pytest.mark.parametrize("case", ["B_three_pictures", "C_adjacent_then_apart", "E_picture_first"])
def test_prefill_in_chunks_equals_prefill_at_once(case, model):
    [row] = CASES[case]
    whole = oracle.run(model, [row], 2)
    for cut in range(1, len(row[0])):
        logits, reader = in_chunks(model, row, [cut])
        assert distance(logits, whole.prefill[0]) < TOLERANCE, cut
        step = reader.decode(whole.tokens[:, :1])
        assert distance(step, whole.steps[:, 1]) < TOLERANCE, cut
    logits, _ = in_chunks(model, row, list(range(1, len(row[0]))))
    assert distance(logits, whole.prefill[0]) < TOLERANCE


FIRST: oracle.Row = ([1, 8, IMAGE, 17, 33], [picture((1, 3))])
ANSWER = [61, 7, 120, 44]


@pytest.mark.parametrize(
    "second",
    [
        ([44, 90, 3, 12], []),
        ([44, 90, IMAGE, 3, 12], [picture((2, 1))]),
        ([IMAGE, IMAGE, 3, 12], [picture((2, 1)), picture((1, 1))]),
        ([44, IMAGE, 3, 12], [picture((1, 3))]),
    ],
    ids=["text", "new picture", "two pictures", "same picture again"],
)
def test_a_cached_second_turn_equals_a_fresh_prefill(second, model):
    reader = oracle.Reader(model)
    reader.prefill(FIRST)
    for token in ANSWER:
        reader.decode(torch.tensor([[token]]))
    [got] = reader.read(second)
    whole = ([*FIRST[0], *ANSWER, *second[0]], [*FIRST[1], *second[1]])
    fresh = oracle.run(model, [whole], 2)
    assert distance(got, fresh.prefill[0][-len(second[0]) :]) < TOLERANCE
    assert distance(reader.decode(fresh.tokens[:, :1]), fresh.steps[:, 1]) < TOLERANCE


def test_a_turn_that_is_taken_back_leaves_no_trace(model):
    reader = oracle.Reader(model)
    reader.prefill(FIRST)
    end = reader.length
    reader.prefill(([44, IMAGE, 3, 12], [picture((2, 1))]))
    reader.decode(torch.tensor([[61]]))
    reader.truncate(end)
    got = reader.prefill(([90, 3], []))
    fresh = oracle.run(model, [([*FIRST[0], 90, 3], FIRST[1])], 1)
    assert distance(got, fresh.steps[:, 0]) < TOLERANCE


def test_a_picture_is_encoded_once_in_a_conversation(model, monkeypatch):
    encoded = []
    original = model.encode
    monkeypatch.setattr(model, "encode", lambda *given: encoded.append(given) or original(*given))
    reader = oracle.Reader(model, rows=2)
    reader.prefill(FIRST)
    reader.truncate(0)
    reader.prefill(FIRST, FIRST)
    assert len(encoded) == 1


def test_growing_the_cache_while_decoding_changes_nothing(model, monkeypatch):
    expected = oracle.run(model, [FIRST], STEPS)
    monkeypatch.setattr("mmchat.models.row_cache.CAPACITY_STEP", 1)
    reader = oracle.Reader(model)
    reader.prefill(FIRST)
    for step in range(STEPS - 1):
        got = reader.decode(expected.tokens[:, step : step + 1])
        assert distance(got, expected.steps[:, step + 1]) < TOLERANCE
    assert reader.cache.layers[0].capacity(0) == len(FIRST[0]) + STEPS - 1


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("count", some([2, 3, 5], [3]))
@pytest.mark.parametrize("case", [*CASES, "NO_PICTURE_IN_ONE_ROW"])
def test_verifying_several_tokens_equals_decoding_one_by_one(case, count, fixed, model):
    rows = CASES.get(case, oracle.NO_PICTURE_IN_ONE_ROW)
    expected = oracle.run(model, rows, 8)
    reader = reader_of(model, len(rows), fixed=fixed)
    reader.prefill(*rows)
    reader.decode(expected.tokens[:, :1])
    got = reader.verify(expected.tokens[:, 1 : 1 + count])
    assert distance(got, expected.steps[:, 2 : 2 + count]) < TOLERANCE
    after = reader.decode(expected.tokens[:, 1 + count : 2 + count])
    assert distance(after, expected.steps[:, 2 + count]) < TOLERANCE


def reader_of(model, slots: int, *, fixed: bool) -> oracle.Reader:
    """With a cache as on a GPU, if `fixed`."""
    text = model.config.text_config
    cache = MllamaCache(text, slots, 1, model.like, fixed=fixed)
    return oracle.Reader(model, slots, cache=cache)


@pytest.mark.parametrize("case", ["B_three_pictures", "C_adjacent", "D_text_only"])
def test_a_rejected_draft_leaves_no_trace(case, model):
    expected = oracle.run(model, CASES[case], 6)
    reader = oracle.Reader(model)
    reader.prefill(*CASES[case])
    end = reader.length
    right = expected.tokens[:, :2]
    wrong = (expected.tokens[:, 2:5] + 1) % CONFIG.text_config.vocab_size
    got = reader.verify(torch.cat((right, wrong), dim=1))
    assert distance(got[:, :2], expected.steps[:, 1:3]) < TOLERANCE
    reader.truncate(end + 2)
    got = reader.verify(expected.tokens[:, 2:5])
    assert distance(got, expected.steps[:, 3:6]) < TOLERANCE


def test_text_only_needs_no_vision_tower(model, weights):
    blind = MllamaForConditionalGeneration(CONFIG)
    text = {name: value for name, value in weights.items() if name.startswith("language_model.")}
    blind.load_state_dict(text, strict=False)
    del blind.vision_model, blind.multi_modal_projector
    got = oracle.run(blind.eval(), CASES["D_text_only"], STEPS)
    assert oracle.difference(got, oracle.run(model, CASES["D_text_only"], got.tokens)) == 0


# Compiled in one graph


def step_arguments(
    model: MllamaForConditionalGeneration, rows: list[oracle.Row]
) -> tuple[torch.Tensor, MllamaCache, tuple[Any, ...]]:
    """Tokens [B] to go on with, a cache in fixed slots, and what `step` reads after the tokens."""
    reader = reader_of(model, len(rows), fixed=True)
    logits = reader.prefill(*rows)
    cache = reader.cache
    cached = [layer.whole[0] for layer in cache.layers]
    seen = cache.seen_steps(range(len(rows)), cache.lengths)
    return logits.argmax(-1), cache, (cache.positions, cached, seen)


def compare_compiled_decode(model, rows, backend: str) -> None:
    torch._dynamo.reset()
    step = torch.compile(model.step, fullgraph=True, dynamic=False, backend=backend)
    expected = oracle.run(model, rows, STEPS)
    tokens, cache, arguments = step_arguments(model, rows)
    for index in range(STEPS - 1):
        with (
            torch.inference_mode(),
            torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"),
        ):
            logits = step(tokens[:, None], *arguments)
        cache.positions += 1
        assert distance(logits, expected.steps[:, index + 1]) < TOLERANCE
        tokens = logits.argmax(-1)


COMPILED_CASES = {
    "one row": CASES["C_adjacent"],
    "text only": CASES["D_text_only"],
    "one and two pictures": CASES["G_one_and_two_pictures"],
    "one and no picture": oracle.NO_PICTURE_IN_ONE_ROW,
}
USUAL = "one and two pictures"  # tracing all takes most of a minute


@pytest.mark.slow
@pytest.mark.parametrize("case", some(COMPILED_CASES, [USUAL]))
def test_decode_is_one_graph_that_is_never_compiled_again(case, shallow):
    compare_compiled_decode(shallow, COMPILED_CASES[case], "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED_CASES)
def test_verifying_is_one_graph(case, shallow):
    torch._dynamo.reset()
    verify = torch.compile(shallow.step, fullgraph=True, dynamic=False, backend="aot_eager")
    rows = COMPILED_CASES[case]
    expected = oracle.run(shallow, rows, STEPS)
    _, _, arguments = step_arguments(shallow, rows)
    with torch.inference_mode():
        got = verify(expected.tokens[:, :4], *arguments)
    assert distance(got.unflatten(0, (len(rows), 4)), expected.steps[:, 1:5]) < TOLERANCE


def compare_compiled_vision(model, canvases, backend: str) -> None:
    torch._dynamo.reset()
    encode = torch.compile(model.vision_states, fullgraph=True, dynamic=False, backend=backend)
    for canvas in canvases:
        image = picture(canvas)
        ratio = image.tensors[1]
        with torch.inference_mode():
            got = encode(image.tensors[0][None], ratio)
            expected = model.vision_states(image.tensors[0][None], ratio)
        assert distance(got, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("canvases", [[(1, 3)], [(1, 1), (3, 1), (2, 2)]])
def test_the_vision_encoder_is_one_graph(canvases, shallow):
    compare_compiled_vision(shallow, canvases, "aot_eager")


# PyTorch warns about its own use of TorchScript when the inductor is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
def test_compiled_by_inductor_both_equal_eager(shallow):
    compare_compiled_decode(shallow, CASES["G_one_and_two_pictures"], "inductor")
    compare_compiled_vision(shallow, [(1, 3)], "inductor")
