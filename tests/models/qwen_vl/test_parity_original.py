"""Logits, embeddings of pictures and pixels are those of the original code (tests/golden)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.qwen_vl import oracle
from tests.models.qwen_vl.oracle import CASES, CONFIG, MODELS, SMALL_CASES, TOLERANCE

CHECKED = [
    (name, side, small, case)
    for name, side, small in MODELS
    for case in (SMALL_CASES if small else CASES)
]


@pytest.mark.parametrize(("name", "side", "small", "case"), CHECKED)
def test_logits_of_a_prompt_and_of_steps_after_it(name, side, small, case):
    assert oracle.difference(oracle.build(side, small=small), name, side, case) < TOLERANCE


def test_the_cases_lie_on_both_sides_of_the_limits_of_rotation():
    alphas = {case: CONFIG.text_config.alpha(len(oracle.token_ids(CASES[case]))) for case in CASES}
    assert alphas == {
        "text": 1,
        "one": 1,
        "first": 1,
        "two": 3,
        "three": 7,
        "long text": 3,
        "at the limit": 1,
        "crossing": 1,  # at its prompt; the six steps go beyond the limit
    }


@pytest.mark.parametrize(("name", "side", "small"), MODELS)
@pytest.mark.parametrize("number", range(3))
def test_embeddings_of_pictures(name, side, small, number):
    model = oracle.build(side, small=small)
    found: list[torch.Tensor] = []
    [pixels] = oracle.media(number, side).tensors
    with torch.inference_mode():
        for _ in model.transformer.visual.slices(pixels[None], found):
            pass
    expected = oracle.golden()[f"{name}/picture {number}/features"]
    assert float(np.abs(found[0][0, ::16].numpy() - expected).max()) < TOLERANCE


@pytest.mark.parametrize("side", [84, 448])
@pytest.mark.parametrize("number", range(3))
def test_pixels_bit_for_bit(side, number):
    [pixels] = oracle.media(number, side).tensors
    expected = oracle.golden()[f"{side}/picture {number}/pixels"]
    assert np.array_equal(pixels.flatten()[:: side * side // 7].numpy(), expected)
