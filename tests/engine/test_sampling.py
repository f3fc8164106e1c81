import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from mmchat.cli.option_groups import with_option_groups
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.engine.sampling import NOT_FINITE, Sampler, SamplingParams, filter_logits
from mmchat.errors import UsageError
from mmchat.repl import settings

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


@pytest.mark.slow
def test_samples_follow_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.tensor(logits).softmax(-1)
    assert (shares(draws(logits), 4) - expected).abs().max() < 0.015


@pytest.mark.slow
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
        ("temperature", 10**400), ("speculate", 65),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UsageError, match=field.replace("stop", "stop string")):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", "1", "temperature must be a number, not str '1'"),
        ("temperature", True, "temperature must be a number, not bool True"),
        ("temperature", None, "temperature must be a number, not NoneType"),
        ("temperature", torch.tensor(1.0), "temperature must be a number, not Tensor"),
        ("top_k", 2.5, "top_k must be a whole number, not 2.5"),
        ("seed", 1.5, "seed must be a whole number, not 1.5"),
        ("max_new_tokens", 2.5, "max_new_tokens must be a whole number, not 2.5"),
        ("max_new_tokens", math.inf, "max_new_tokens must be a whole number, not inf"),
        ("logprobs", [3], "logprobs must be a number, not list"),
        ("stop", 7, "stop must be strings, not int 7"),
        ("stop", b"dog", "stop must be strings, not bytes"),
        ("stop", ["dog", 7], "a stop string must be text, not int"),
        ("stop", ["x" * 1025], "a stop string must have at most 1,024 characters, not 1,025"),
        ("speculate", True, "speculate must be auto, off or a number from 0 to 64, not True"),
        ("speculate", "7", "speculate must be auto, off or a number"),
        ("speculate", [7], "speculate must be auto, off or a number"),
    ],
)
def test_values_of_another_type_are_named(field, value, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        SamplingParams(**{field: value})


def test_numbers_count_by_their_value_and_one_stop_string_is_a_list_of_it():
    params = SamplingParams(temperature=1, seed=np.int64(3), top_k=5.0, top_p=np.float32(0.5))
    assert (params.temperature, params.seed, params.top_k, params.top_p) == (1.0, 3, 5, 0.5)
    assert [type(v) for v in (params.temperature, params.seed, params.top_k)] == [float, int, int]
    assert SamplingParams(stop="dog").stop == ("dog",)
    assert SamplingParams(stop=["dog", "cat"]).stop == ("dog", "cat")


# The least and the greatest value of each setting, and one beyond it.
EXTREMES = {
    "temperature": (0, 100, 101), "top_k": (0, 10**30, -1), "top_p": (0, 1, 1.1),
    "min_p": (0, 1, -0.1), "repetition_penalty": (0.01, 100, 0), "seed": (0, 2**63 - 1, 2**63),
    "frequency_penalty": (-2, 2, 2.1), "presence_penalty": (-2, 2, -2.1),
    "max_new_tokens": (1, 10**30, 0),
}  # fmt: skip


def given_in_python(name, value):
    return SamplingParams(**{name: value})


def given_by_set(name, value):
    return settings.changed(SamplingParams(), f"{name} {value}")


def given_on_the_command_line(name, value):
    app = typer.Typer()
    found = []

    @app.command()
    @with_option_groups
    def take(options: SamplingOptions) -> None:
        found.append(SamplingParams(**options.chosen()))

    done = CliRunner().invoke(app, [f"--{name.replace('_', '-')}", str(value)])
    if done.exit_code == 2:
        raise UsageError(done.output)
    assert done.exit_code == 0, done.output
    return found[0]


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("give", [given_in_python, given_by_set, given_on_the_command_line])
def test_the_limits_are_the_same_wherever_a_value_is_given(give, name):
    least, most, beyond = EXTREMES[name]
    for value in (least, most):
        assert getattr(give(name, value), name) == value
    with pytest.raises(UsageError):
        give(name, beyond)


LOGITS = {
    "usual": [3.0, 2.9995, -40.0, 1.0],
    "large": [3e37, -3e37, 2e37, 1e30],
    "tiny": [1e-40, 0.0, -1e-40, 1e-45],
    "equal": [7.0, 7.0, 7.0, 7.0],
}


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 9.9e-6, 1e-5, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_no_extreme_gives_a_token_that_its_filters_dropped(temperature, logits):
    """Whatever the settings, and those of them together that are the most extreme."""
    spread = [(logit - max(logits)) / max(temperature, 1e-5) for logit in logits]
    best = [i for i, off in enumerate(spread) if off > -1e-6]
    if temperature < 1e-5:
        assert draws(logits, 5, temperature=temperature) == [logits.index(max(logits))] * 5
    likely = [i for i, off in enumerate(spread) if off > -80]  # others are one in 10**34
    assert set(draws(logits, 50, temperature=temperature)) <= set(likely)
    for filters in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}, {"top_p": 0, "min_p": 1}):
        assert set(draws(logits, 20, temperature=temperature, **filters)) <= set(best)


def test_logits_that_penalties_make_infinite_give_no_token():
    found = draws([3e38, 1.0, -3e38], 1, prompt=[0, 2], repetition_penalty=0.01)
    assert found == [NOT_FINITE]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 10**5000},
        {"top_k": Fraction(10**400)},
        {"top_p": 10**400},
        {"speculate": np.array([1, 2])},
        {"speculate": 10**5000},
    ],
)
def test_a_number_beyond_all_bounds_is_a_usage_error(setting):
    with pytest.raises(UsageError):
        SamplingParams(**setting)
