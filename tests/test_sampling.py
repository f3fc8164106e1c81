import math

import pytest
import torch

from mmchat.errors import UsageError
from mmchat.sampling import NOT_FINITE, Sampler, SamplingParams, filter_logits

CPU = torch.device("cpu")


def kept(logits, **options):
    params = SamplingParams(temperature=1.0, **{"top_p": 1.0, **options})
    return torch.isfinite(filter_logits(torch.tensor(logits), params)).nonzero().flatten().tolist()


def draws(logits, count=20_000, prompt=(), **options):
    sampler = Sampler(
        SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 0, **options}),
        list(prompt), len(logits), CPU,
    )  # fmt: skip
    return [int(sampler.sample(torch.tensor([logits]))) for _ in range(count)]


def shares(tokens, size):
    return torch.bincount(torch.tensor(tokens), minlength=size) / len(tokens)


def test_zero_temperature_takes_the_most_probable():
    assert draws([1.0, 3.0, 2.0], count=5, temperature=0.0) == [1] * 5


def test_samples_follow_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.tensor(logits).softmax(-1)
    assert (shares(draws(logits), 4) - expected).abs().max() < 0.015


def test_temperature_divides_the_logits():
    logits = [0.0, 1.0, 2.0]
    expected = (torch.tensor(logits) / 2).softmax(-1)
    assert (shares(draws(logits, temperature=2.0), 3) - expected).abs().max() < 0.015


def test_top_k_keeps_k():
    assert kept([0.1, 3.0, 2.0, 1.0], top_k=2) == [1, 2]
    assert kept([0.1, 3.0], top_k=50) == [0, 1]


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in probabilities]
    assert kept(logits, top_p=0.6) == [0, 1]
    assert kept(logits, top_p=0.79) == [0, 1]
    assert kept(logits, top_p=0.81) == [0, 1, 2]
    assert kept(logits, top_p=0.0) == [0]


def test_top_p_is_metas_rule_on_random_distributions():
    """Drop a sorted token if the cumulative probability before it exceeds p."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        logits = 3 * torch.randn(50, generator=generator)
        probabilities, order = torch.sort(logits.softmax(-1), descending=True)
        total, expected = 0.0, []
        for probability, token in zip(probabilities.tolist(), order.tolist(), strict=True):
            if total > 0.9:
                break
            expected.append(token)
            total += probability
        assert kept(logits.tolist(), top_p=0.9) == sorted(expected)


def test_min_p_is_relative_to_the_most_probable():
    logits = [math.log(p) for p in (0.6, 0.3, 0.07, 0.03)]
    assert kept(logits, min_p=0.1) == [0, 1, 2]
    assert kept(logits, min_p=0.4) == [0, 1]
    assert kept(logits, min_p=1.0) == [0]


def test_repetition_penalty_counts_prompt_and_answer():
    # 2.0 / 3 falls below 1.0, so the two take turns only until both were seen
    assert draws([2.0, 1.0], count=1, prompt=[0], temperature=0.0, repetition_penalty=3.0) == [1]
    assert draws([2.0, 1.0], count=3, temperature=0.0, repetition_penalty=3.0) == [0, 1, 0]
    assert draws([-1.0, -1.5], count=1, prompt=[0], temperature=0.0, repetition_penalty=2.0) == [1]


def test_a_token_that_comes_twice_is_penalised_once_for_being_there():
    greedy = {"temperature": 0.0}
    # 2 / 1.5 stays above 1, 2 / 1.5² does not
    assert draws([2.0, 1.0], count=3, prompt=[0, 0], repetition_penalty=1.5, **greedy) == [0] * 3
    assert draws([-1.0, -1.8], count=1, prompt=[0, 0], repetition_penalty=1.5, **greedy) == [0]
    assert draws([2.0, 1.5], count=4, presence_penalty=0.3, **greedy) == [0] * 4


def test_presence_and_frequency_penalties_count_the_answer_only():
    assert draws([2.0, 1.5], count=1, prompt=[0], temperature=0.0, presence_penalty=1.0) == [0]
    assert draws([2.0, 1.5], count=2, temperature=0.0, presence_penalty=1.0) == [0, 1]
    # after n times 0 its score is 2 - 0.2 n: 0, 0, 0, then 1.4 < 1.5
    assert draws([2.0, 1.5], count=4, temperature=0.0, frequency_penalty=0.2) == [0, 0, 0, 1]


def test_image_token_in_the_prompt_has_no_logit_and_is_skipped():
    assert draws([1.0, 2.0], count=1, prompt=[0, 2], temperature=0.0, repetition_penalty=1.5) == [1]


def test_equal_seeds_give_equal_tokens_and_zero_is_a_seed():
    logits = [0.0] * 50
    assert draws(logits, 50, seed=0) == draws(logits, 50, seed=0)
    assert draws(logits, 50, seed=0) != draws(logits, 50, seed=1)
    assert Sampler(SamplingParams(seed=0), [], 3, CPU).seed == 0


def test_a_drawn_seed_repeats_the_answer():
    first = Sampler(SamplingParams(temperature=1.0), [], 50, CPU)
    again = Sampler(SamplingParams(temperature=1.0, seed=first.seed), [], 50, CPU)
    logits = torch.zeros(1, 50)
    assert [int(first.sample(logits)) for _ in range(20)] == [
        int(again.sample(logits)) for _ in range(20)
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(bad, temperature):
    sampler = Sampler(SamplingParams(temperature=temperature), [], 3, CPU)
    assert int(sampler.sample(torch.tensor([[1.0, bad, 0.0]]))) == NOT_FINITE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("top_p", 1.1), ("top_k", -1),
        ("min_p", 2.0), ("repetition_penalty", 0.0), ("frequency_penalty", math.inf),
        ("max_new_tokens", 0), ("seed", -1), ("seed", 2**63), ("logprobs", 21), ("stop", ("",)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UsageError, match=field.replace("stop", "stop string")):
        SamplingParams(**{field: value})
