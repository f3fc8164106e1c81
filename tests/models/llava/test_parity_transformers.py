"""Our LLaVA against transformers, live, with the same random weights in both (float32)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.llava import oracle
from tests.models.llava import transformers_llava as theirs
from tests.models.llava.oracle import CASES, CONFIG, FEATURES, TOLERANCE, distance

STEPS = 6


def assert_agrees(weights, config, case, attention="sdpa"):
    their = theirs.build(weights, config, attention)
    expected, said = theirs.run(their, CASES[case], STEPS, config.positions_per_image)
    assert 0.2 < float(expected.std()) < 5
    found = oracle.logits(oracle.build(weights, config), CASES[case], said)
    assert distance(found, expected) < TOLERANCE


def test_every_parameter_is_random():
    for name, value in oracle.random_weights().items():
        assert float(value.std()) > 0, name
        assert not bool((value == 1).any()), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_decode_agree(case, attention):
    assert_agrees(oracle.random_weights(), CONFIG, case, attention)


@pytest.mark.parametrize("chosen", FEATURES)
def test_other_states_of_the_vision_encoder_agree(chosen):
    config = oracle.with_features(*FEATURES[chosen])
    assert_agrees(oracle.random_weights(config), config, "two")


def test_grouped_key_value_heads_agree():
    config = replace(CONFIG, text_config=replace(CONFIG.text_config, num_key_value_heads=2))
    assert_agrees(oracle.random_weights(config), config, "two")


@pytest.mark.parametrize("case", ["two", "text"])
def test_norms_of_small_numbers_agree_in_their_eps(case):
    assert_agrees(oracle.random_weights(small=True), CONFIG, case)


def test_features_of_pictures_agree():
    model = oracle.build(oracle.random_weights())
    their = theirs.build(oracle.random_weights())
    with torch.inference_mode():
        pixels = torch.stack([oracle.A.tensors[0], oracle.B.tensors[0]])
        features: list[torch.Tensor] = []
        for _ in model.vision_tower.slices(pixels, features):
            pass
        found = model.multi_modal_projector(features[0])
        expected: Any = their.model.get_image_features(pixel_values=pixels)
    assert distance(found, torch.stack(list(expected.pooler_output))) < TOLERANCE
