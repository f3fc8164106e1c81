"""Texts of more than 1,500 positions, and rotary frequencies scaled otherwise, live against
transformers: a thin model with random weights, float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmchat.models.mllama.config import MllamaConfig, RopeScaling
from mmchat.nn.rope import RotaryEmbedding
from tests.models.mllama import oracle
from tests.models.mllama import transformers_mllama as theirs
from tests.models.mllama.oracle import THIN, TOLERANCE, difference, distance, long_row

LENGTH = 1_600
SCALINGS = {
    "factor of 32": RopeScaling(32.0, 1.0, 4.0, 8192),
    "another low factor": RopeScaling(8.0, 3.0, 4.0, 2048),
    "another high factor": RopeScaling(8.0, 1.0, 16.0, 2048),
    "another context": RopeScaling(8.0, 1.0, 4.0, 100),
    "none": None,
}


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights(THIN)


@pytest.fixture(scope="module")
def ours(weights):
    return oracle.build(weights, THIN)


@pytest.fixture(scope="module")
def corrected(weights):
    return theirs.build(weights, ours=THIN)


def test_a_long_prompt_and_what_is_decoded_after_it_agree(ours, corrected):
    row = long_row(LENGTH)
    expected = theirs.run(corrected, [row], 12)
    assert difference(oracle.run(ours, [row], expected.tokens), expected) < TOLERANCE
    reader, pieces = oracle.Reader(ours), []
    for start, end in ((0, 255), (255, 700), (700, 1_500), (1_500, LENGTH)):
        piece = row[0][start:end], row[1] if start == 0 else []
        pieces += reader.read(piece)
    assert distance(torch.cat(pieces), expected.prefill[0]) < TOLERANCE
    drafted = reader.verify(expected.tokens[:, :4])
    assert distance(drafted, expected.steps[:, 1:5]) < TOLERANCE


def test_decoding_a_long_text_token_by_token_agrees_with_one_pass(ours, corrected):
    expected = theirs.run(corrected, [long_row(LENGTH)], 1).prefill[0]
    assert difference_decoding(ours, expected) < TOLERANCE


def difference_decoding(model, expected) -> float:
    """Largest difference of the logits of tokens that are decoded where a cache grows, and late."""
    ids, pictures = long_row(len(expected))
    reader, largest = oracle.Reader(model), 0.0
    for start, middle, end in ((0, 250, 260), (260, 1_450, len(ids))):
        piece = ids[start:middle], pictures if start == 0 else []
        reader.prefill(piece)
        steps = [reader.decode(torch.tensor([[token]])) for token in ids[middle:end]]
        largest = max(largest, distance(torch.cat(steps), expected[middle:end]))
    return largest


def test_angles_of_late_positions_are_those_of_exact_arithmetic():
    """float16 has every whole number up to 2,048 only; float32 rounds the last angle by 0.004."""
    scaling = THIN.text_config.rope_scaling
    assert scaling is not None
    rotary = RotaryEmbedding(16, 500_000.0, vars(scaling))
    positions = torch.tensor([0, 257, 2_047, 2_049, 5_001, 65_537, 131_071])
    exact = torch.outer(positions.double(), rotary.inv_freq.double()).repeat(1, 2)
    cos, sin = rotary(positions)
    assert distance(cos[:, 0], exact.cos()) < 0.005
    assert distance(sin[:, 0], exact.sin()) < 0.005


def with_scaling(scaling: RopeScaling | None) -> MllamaConfig:
    return replace(THIN, text_config=replace(THIN.text_config, rope_scaling=scaling))


@pytest.mark.parametrize("name", SCALINGS)
def test_other_ways_to_scale_the_rotary_frequencies_agree(name, weights):
    config, row = with_scaling(SCALINGS[name]), long_row(300)
    model, other = oracle.build(weights, config), theirs.build(weights, ours=config)
    frequencies = model.language_model.model.rotary.inv_freq
    assert torch.equal(frequencies, other.model.language_model.rotary_emb.inv_freq)
    expected = theirs.run(other, [row], 1)
    assert difference(oracle.run(model, [row], expected.tokens), expected) < TOLERANCE
