"""Our model against transformers, live, with the same random weights in both (float32)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.models.mllama import oracle, plain_mllama
from tests.models.mllama import transformers_mllama as theirs
from tests.models.mllama.oracle import (
    CASES,
    CONFIG,
    IMAGE,
    TOLERANCE,
    difference,
    distance,
    picture,
)

STEPS = 6
MENDED = "transformers mended its fault: drop the correction in transformers_mllama.build"


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def ours(weights):
    return oracle.build(weights)


@pytest.fixture(scope="module")
def corrected(weights):
    return theirs.build(weights)


def test_every_parameter_is_random(weights):
    for name, value in weights.items():
        if "gate" in name.rsplit(".", 1)[-1]:
            assert float(value.abs().min()) > 0.3, name
        else:
            assert float(value.std()) > 0, name
        assert not bool((value == 1).all()), name


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("G")])
def test_prefill_and_decode_agree(case, ours, corrected):
    expected = theirs.run(corrected, CASES[case], STEPS)
    assert expected.steps.shape[1] == STEPS
    assert difference(oracle.run(ours, CASES[case], expected.tokens), expected) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["A_start_picture_text", "C_adjacent_then_apart", "E_picture_first"]
)
def test_eager_attention_agrees(case, ours, weights):
    expected = theirs.run(theirs.build(weights, attention="eager"), CASES[case], STEPS)
    assert difference(oracle.run(ours, CASES[case], expected.tokens), expected) < TOLERANCE


def test_a_batch_with_one_and_two_pictures_agrees_padded_left_and_right(ours, corrected):
    rows = CASES["G_one_and_two_pictures"]
    left = theirs.run(corrected, rows, STEPS, side="left")
    right = theirs.run(corrected, rows, STEPS, side="right")
    got = oracle.run(ours, rows, left.tokens)
    assert difference(got, left) < TOLERANCE
    for mine, other in zip(got.prefill, right.prefill, strict=True):
        assert distance(mine, other) < TOLERANCE


def test_a_batch_in_which_one_row_has_no_picture_agrees(ours, corrected):
    rows = oracle.NO_PICTURE_IN_ONE_ROW
    expected = theirs.run(corrected, rows, STEPS, side="left")
    assert difference(oracle.run(ours, rows, expected.tokens), expected) < TOLERANCE


@pytest.mark.parametrize("canvas", oracle.CANVASES)
def test_vision_states_agree_on_every_canvas(canvas, ours, corrected):
    image = picture(canvas)
    batch = theirs.inputs_of([([IMAGE], [image])])
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    with torch.inference_mode():
        features = corrected.model.vision_model(**{name: batch[name] for name in names})
        features = features.last_hidden_state[0, 0, : len(image.tensors[0])]
        expected = corrected.model.multi_modal_projector(features)
        ratio = image.tensors[1]
        got_features = ours.vision_model(image.tensors[0][None], ratio)[0]
        got = ours.vision_states(image.tensors[0][None], ratio)[0]
    assert distance(got_features, features.flatten(0, 1)) < TOLERANCE
    assert distance(got, expected.flatten(0, 1)) < TOLERANCE


def test_another_norm_eps_is_that_of_the_vision_layers_alone():
    vision = dataclasses.replace(CONFIG.vision_config, norm_eps=1e-3)
    config = dataclasses.replace(CONFIG, vision_config=vision)
    weights = oracle.random_weights()
    case = CASES["F_canvas_2x1"]
    expected = theirs.run(theirs.build(weights, ours=config), case, STEPS)
    got = oracle.run(oracle.build(weights, config), case, expected.tokens)
    assert difference(got, expected) < TOLERANCE


def test_tables_filled_for_tiles_that_a_canvas_lacks_agree():
    """Training in transformers fills them, since it adds them to padding tiles."""
    weights = oracle.random_weights(fill_unused_tiles=True)
    ours, corrected = oracle.build(weights), theirs.build(weights)
    assert ours.remarks
    for case in ("F_canvas_1x1", "F_canvas_2x1", "F_canvas_2x2", "C_adjacent_then_apart"):
        expected = theirs.run(corrected, CASES[case], STEPS)
        got = oracle.run(ours, CASES[case], expected.tokens)
        assert difference(got, expected) < TOLERANCE, case


def test_a_picture_added_in_a_later_turn_agrees_with_reading_everything_at_once(ours, corrected):
    first: oracle.Row = ([1, 8, IMAGE, 17, 33], [picture((1, 3))])
    second: oracle.Row = ([44, 90, IMAGE, 3, 12], [picture((2, 1))])
    reader = oracle.Reader(ours)
    reader.read(first)
    answer = [61, 7, 120]
    for token in answer:
        reader.decode(torch.tensor([[token]]))
    got = reader.read(second)
    whole: oracle.Row = ([*first[0], *answer, *second[0]], [*first[1], *second[1]])
    expected = theirs.run(corrected, [whole], STEPS)
    assert distance(got[0], expected.prefill[0][-len(second[0]) :]) < TOLERANCE
    step = reader.decode(expected.tokens[:, :1])
    assert distance(step, expected.steps[:, 1]) < TOLERANCE


def test_without_a_cross_attention_mask_eager_agrees_and_sdpa_turns_causal(ours, weights):
    # All positions see all four tiles of this picture, so leaving the mask out should not matter.
    rows = CASES["E_picture_first"]
    inputs = theirs.inputs_of(rows)
    del inputs["cross_attention_mask"]
    got = oracle.run(ours, rows, 1).prefill[0]
    with torch.inference_mode():
        eager = theirs.build(weights, attention="eager")(**inputs).logits[0]
        sdpa = theirs.build(weights, attention="sdpa")(**inputs).logits[0]
    assert distance(got, eager) < TOLERANCE
    assert distance(got, sdpa) > 1e-2, "transformers mended this fault: expect agreement here"


def test_bfloat16_stays_near_float32_and_near_transformers(weights):
    rows = CASES["C_adjacent_then_apart"]
    narrow = {name: value.bfloat16() for name, value in weights.items()}
    exact = oracle.run(oracle.build(weights), rows, 1)
    got = oracle.run(oracle.build(narrow, dtype=torch.bfloat16), rows, exact.tokens)
    other = theirs.run(theirs.build(weights).bfloat16(), rows, 1)
    assert 1e-3 < distance(got.prefill[0], exact.prefill[0]) < 0.3
    assert distance(got.prefill[0], other.prefill[0]) < 0.3


# The faults of transformers, pinned so that their mending is noticed.


def test_fault_transformers_takes_the_outputs_of_the_intermediate_layers(weights):
    image = picture((1, 3))
    batch = theirs.inputs_of([([IMAGE], [image])])
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    vision = theirs.build(weights, shift_indices=False).model.vision_model

    def expected(indices: tuple[int, ...]) -> torch.Tensor:
        tower = dataclasses.replace(CONFIG.vision_config, intermediate_layers_indices=indices)
        config = dataclasses.replace(CONFIG, vision_config=tower)
        return plain_mllama.vision_features(weights, config, image.tensors[0], (1, 3))

    with torch.inference_mode():
        vision.intermediate_layers_indices = [1, 2, 4]
        features = vision(**{name: batch[name] for name in names}).last_hidden_state[0, 0, :3]
        assert distance(features, expected((1, 2, 4))) > 1e-2, MENDED
        assert distance(features, expected((2, 3, 5))) < TOLERANCE
    width = CONFIG.vision_config.hidden_size
    assert distance(features[..., :width], expected((1, 2, 4))[..., :width]) < TOLERANCE


def test_fault_transformers_shows_pictures_to_the_text_before_them(ours, weights):
    faulty = theirs.build(weights, mask_rows=False)
    after, first = CASES["F_canvas_2x2"], CASES["E_picture_first"]
    expected = oracle.run(ours, after, 1).prefill[0]
    got = theirs.run(faulty, after, 1).prefill[0]
    for position in range(2):  # text before the picture
        assert distance(got[position], expected[position]) > 1e-2, MENDED
    got = theirs.run(faulty, first, STEPS)  # nothing stands before the picture
    assert difference(oracle.run(ours, first, got.tokens), got) < TOLERANCE
