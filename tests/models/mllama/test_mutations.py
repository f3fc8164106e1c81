"""The parity tests can fail: each of the mistakes in mutations.py is seen by a comparison.

The same comparisons as in the parity tests run over a few cases and must see more than ten times
the tolerance in at least one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest

from mmchat.engine.sampling import Sampler
from mmchat.models.mllama import meta_format
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.prompt import Prompt
from mmchat.nn.rope import RotaryEmbedding
from tests.engine import test_sampling
from tests.models.mllama import oracle, test_long_texts, test_processor, test_weights
from tests.models.mllama import transformers_mllama as theirs
from tests.models.mllama.mutations import MUTATIONS
from tests.models.mllama.oracle import CASES, CONFIG, THIN, TOLERANCE, Row, difference
from tests.models.mllama.test_long_texts import SCALINGS, difference_decoding, with_scaling

pytestmark = pytest.mark.slow

STEPS = 5
LONG = "long texts"


@dataclass(frozen=True)
class Comparison:
    """Models of `config`, and the rows that they read and continue."""

    config: MllamaConfig
    rows: tuple[tuple[Row, ...], ...]
    fill_unused_tiles: bool = False


def cases(*names: str) -> tuple[tuple[Row, ...], ...]:
    return tuple(tuple(CASES[name]) for name in names)


COMPARED = cases(
    "A_start_picture_text",
    "B_text_between_pictures",
    "C_adjacent_then_apart",
    "C_three_adjacent",
    "F_canvas_2x2",
    "F_canvas_3x1",
)
COMPARISONS = {
    "cases": Comparison(CONFIG, COMPARED),
    LONG: Comparison(THIN, ((oracle.long_row(1_600),),)),
    "scaling": Comparison(THIN, ((oracle.long_row(300),),)),
    "filled tables": Comparison(CONFIG, cases("F_canvas_1x1"), fill_unused_tiles=True),
    "norm_eps": Comparison(
        replace(CONFIG, vision_config=replace(CONFIG.vision_config, norm_eps=1e-3)),
        cases("F_canvas_2x1"),
    ),
}


@cache
def weights_of(name: str):
    chosen = COMPARISONS[name]
    return oracle.random_weights(chosen.config, fill_unused_tiles=chosen.fill_unused_tiles)


@cache
def expected_of(name: str):
    corrected = theirs.build(weights_of(name), ours=COMPARISONS[name].config)
    return [theirs.run(corrected, rows, STEPS) for rows in COMPARISONS[name].rows]


def largest_difference(model, name: str) -> float:
    found = [
        difference(oracle.run(model, rows, outputs.tokens), outputs)
        for rows, outputs in zip(COMPARISONS[name].rows, expected_of(name), strict=True)
    ]
    if name == LONG:
        found.append(difference_decoding(model, expected_of(name)[0].prefill[0]))
    return max(found)


@pytest.mark.parametrize("name", COMPARISONS)
def test_without_a_mutation_the_comparison_agrees(name):
    assert largest_difference(oracle.build(weights_of(name), COMPARISONS[name].config), name) < (
        TOLERANCE
    )


@pytest.mark.parametrize(
    ("comparison", "name"),
    [(comparison, name) for comparison, found in MUTATIONS.items() for name in found],
)
def test_the_comparison_sees(comparison, name, monkeypatch):
    model = oracle.build(weights_of(comparison), COMPARISONS[comparison].config)
    MUTATIONS[comparison][name](model, monkeypatch)
    assert largest_difference(model, comparison) > 10 * TOLERANCE


def test_every_scaling_in_the_parity_tests_differs_from_the_released_one():
    """In one number each, so that none of them can be a constant."""
    released = CONFIG.text_config.rope_scaling
    assert released not in SCALINGS.values()
    weights = weights_of("scaling")
    outputs = [
        oracle.run(oracle.build(weights, with_scaling(scaling)), [oracle.long_row(300)], 1)
        for scaling in (*SCALINGS.values(), released)
    ]
    assert min(difference(one, outputs[-1]) for one in outputs[:-1]) > 10 * TOLERANCE


# Mistakes outside the model, each of which one test must see


def penalise_every_occurrence(patch) -> None:
    original = Sampler.__init__

    def counting(self, params, prompt_ids, vocab_size, device):
        original(self, params, prompt_ids, vocab_size, device)
        self._prompt_ids = prompt_ids

    def penalize(self, logits):
        penalty = self.params.repetition_penalty
        for token in self._prompt_ids:
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        return logits

    patch.setattr(Sampler, "__init__", counting)
    patch.setattr(Sampler, "_penalize", penalize)


def presence_as_frequency(patch) -> None:
    patch.setattr(
        Sampler, "_penalize", lambda self, x: x - self.params.presence_penalty * self._counts
    )


def one_key_head_left_as_it_is(patch) -> None:
    original = meta_format.interleaved_to_halves
    patch.setattr(
        meta_format,
        "interleaved_to_halves",
        lambda heads: meta_format.identity if heads == 1 else original(heads),
    )


def fingerprint_of_ids_alone(patch) -> None:
    patch.setattr(Prompt, "fingerprint", property(lambda self: self.token_ids))


def fingerprint_of_sizes(patch) -> None:
    def sized(self):
        marks = list(self.token_ids)
        for placed in self.media:
            marks[placed.position] = str(placed.media.facts)
        return tuple(marks)

    patch.setattr(Prompt, "fingerprint", property(sized))


def positions_in_float16(patch) -> None:
    original = RotaryEmbedding.forward
    patch.setattr(RotaryEmbedding, "forward", lambda self, at: original(self, at.half()))


SEEN_BY: dict[Callable, Callable] = {
    penalise_every_occurrence: (
        test_sampling.test_a_token_that_comes_twice_is_penalised_once_for_being_there
    ),
    presence_as_frequency: (
        test_sampling.test_a_token_that_comes_twice_is_penalised_once_for_being_there
    ),
    positions_in_float16: (
        test_long_texts.test_angles_of_late_positions_are_those_of_exact_arithmetic
    ),
    one_key_head_left_as_it_is: test_weights.test_one_key_value_head_is_permuted_as_any_other,
    fingerprint_of_ids_alone: (
        test_processor.test_a_picture_replaced_at_the_same_place_changes_the_fingerprint_there
    ),
    fingerprint_of_sizes: (
        test_processor.test_a_picture_replaced_at_the_same_place_changes_the_fingerprint_there
    ),
}


@pytest.mark.parametrize("mistake", SEEN_BY)
def test_a_mistake_is_seen_by_its_test(mistake, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        SEEN_BY[mistake]()
