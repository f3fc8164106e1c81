"""The parity tests can fail: each of the mistakes in mutations.py is seen by the comparison.

The same comparison as in test_parity_transformers.py runs over a few cases and must see more than
ten times the tolerance in at least one of them.
"""

from __future__ import annotations

import pytest

from tests.models.mllama import oracle
from tests.models.mllama import transformers_mllama as theirs
from tests.models.mllama.mutations import MUTATIONS
from tests.models.mllama.oracle import CASES, TOLERANCE, difference

pytestmark = pytest.mark.slow

STEPS = 5
COMPARED = (
    "A_start_picture_text",
    "B_text_between_pictures",
    "C_adjacent_then_apart",
    "F_canvas_2x2",
    "F_canvas_3x1",
)


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def expected(weights):
    corrected = theirs.build(weights)
    return {name: theirs.run(corrected, CASES[name], STEPS) for name in COMPARED}


def largest_difference(model, expected) -> float:
    return max(
        difference(oracle.run(model, CASES[name], outputs.tokens), outputs)
        for name, outputs in expected.items()
    )


def test_without_a_mutation_the_comparison_agrees(weights, expected):
    assert largest_difference(oracle.build(weights), expected) < TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_sees(name, weights, expected, monkeypatch):
    model = oracle.build(weights)
    MUTATIONS[name](model, monkeypatch)
    assert largest_difference(model, expected) > 10 * TOLERANCE
