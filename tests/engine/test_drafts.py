"""Drafts change how an answer is computed, and nothing of the answer."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmchat
from mmchat.chat.session import ChatSession
from mmchat.engine.drafts import Drafter, Pace, PromptLookup
from mmchat.engine.driver import run
from mmchat.engine.engine import Engine
from mmchat.engine.events import Finished, TextDelta
from mmchat.engine.request import Request
from mmchat.engine.sampling import SamplingParams, filter_logits
from mmchat.errors import NumericalError, UsageError
from mmchat.models.prompt import Prompt
from mmchat.repl import settings
from tests.fake_model import EOT, FakeCache, fake_model
from tests.kinds import some
from tests.loading.test_loader import small_config, write_hf_folder
from tests.models.mllama.oracle import random_weights

POEM = b"the cat sat on the mat. the cat sat on the hat. the cat sat on the bat."
LENGTHS = ("off", 1, 3, 8, "auto")


def finish(events):
    *_, last = events
    assert isinstance(last, Finished)
    return last


# What is drafted


def drafter(ids, speculate=8, stop_ids=(), vocab_size=1000):
    return Drafter(ids, speculate, Pace(), stop_ids=stop_ids, vocab_size=vocab_size)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_the_place_is_the_newest_of_those_with_the_longest_match(ids):
    def matched(place):
        pairs = zip(reversed(ids[:place]), reversed(ids), strict=False)
        return min(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))), 8)

    found, length = PromptLookup(ids).find()
    candidates = [place for place in range(len(ids)) if matched(place) >= 2][-16:]
    if not candidates:
        assert length == 0
        return
    best = max(candidates, key=lambda place: (matched(place), place))
    assert (found, length) == (best, matched(best))


def test_what_followed_is_drafted():
    assert drafter([7, 1, 2, 3, 4, 5, 9, 1, 2]).draft(3) == [3, 4, 5]
    assert drafter([7, 1, 2, 3, 4, 5, 9, 1, 2], speculate=2).draft(5) == [3, 4]


def test_a_copy_goes_on_after_a_replaced_token():
    drafts = drafter([7, 1, 2, 3, 4, 5, 6, 1, 2], speculate=2)
    assert drafts.draft(2) == [3, 4]
    for token_id in (3, 99):
        drafts.append(token_id)
    assert drafts.draft(2) == [5, 6]
    for token_id in (5, 98):
        drafts.append(token_id)
    assert drafts.draft(2) == [1, 2]


def test_two_replaced_tokens_end_a_copy():
    lookup = PromptLookup([7, 1, 2, 3, 4, 5, 6, 1, 2])
    assert lookup.find() == (3, 2)
    for token_id, found in ((3, (4, 3)), (99, (5, 1)), (98, (0, 0)), (6, (0, 0)), (1, (8, 2))):
        lookup.append(token_id)
        assert lookup.find() == found


def test_a_longer_match_wins_over_a_newer_one():
    assert drafter([5, 1, 2, 30, 6, 1, 2, 40, 5, 1, 2]).draft(1) == [30]


def test_a_repetition_is_drafted_beyond_the_end_of_the_text():
    assert drafter([9, 1, 2, 3, 1, 2, 3, 1, 2]).draft(7) == [3, 1, 2, 3, 1, 2, 3]


def test_the_answer_is_looked_up_too():
    guesses = drafter([1, 2, 3])
    assert guesses.draft(4) == []
    for token_id in (8, 1, 2):
        guesses.append(token_id)
    assert guesses.draft(2) == [3, 8]


def test_a_draft_ends_at_a_stop_token_and_before_an_image_token():
    ids = [1, 2, 3, 4, 5, 1, 2]
    assert drafter(ids, stop_ids={4}).draft(5) == [3, 4]
    assert drafter(ids, vocab_size=4).draft(5) == [3]
    assert drafter([1, 2, 99, 1, 2], vocab_size=99).draft(5) == []


@pytest.mark.parametrize("speculate", ["off", 0])
def test_off_drafts_nothing(speculate):
    assert drafter([1, 2, 3, 1, 2], speculate=speculate).draft(5) == []


@pytest.mark.parametrize("speculate", [-1, 65, "on", 1.5])
def test_other_values_are_refused(speculate):
    with pytest.raises(UsageError, match="speculate must be"):
        SamplingParams(speculate=speculate)


def test_a_chat_sets_it_by_name():
    for text, value in (("4", 4), ("off", "off"), ("auto", "auto")):
        assert settings.changed(SamplingParams(), f"speculate {text}").speculate == value
    with pytest.raises(UsageError, match="must be auto, off or a number"):
        settings.changed(SamplingParams(), "speculate on")


# What pays


def simulated(cost_of_rows, share_right, steps, seed=0, match=4):
    """Seconds for `steps` tokens with and without drafts; every step finds a match."""
    chance, pace = random.Random(seed), Pace()
    seconds = tokens = 0
    while tokens < steps:
        length = pace.draft_length(match)
        spent = cost_of_rows(length + 1)
        right = 0
        while right < length and chance.random() < share_right:
            right += 1
        seconds, tokens = seconds + spent, tokens + right + 1
        if length:
            pace.verified(length, right, match, spent)
        else:
            pace.stepped(spent)
            pace.compared(match, int(chance.random() < share_right), 1)
    return seconds, tokens * cost_of_rows(1)


COSTS = {
    "flat": lambda rows: 1.0 + 0.01 * rows,
    "linear": lambda rows: float(rows),
    "free to 4, then linear": lambda rows: max(1.0, rows / 4) + 0.02 * rows,
    "slow": lambda rows: 1.0 if rows == 1 else 8.0 + rows,
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("share_right", [0.0, 0.1, 0.3, 0.6])
def test_drafts_never_cost_more_than_three_percent(cost, share_right):
    for seed in range(5):
        with_drafts, plain = simulated(COSTS[cost], share_right, 300, seed)
        worst = 8.0 * COSTS[cost](1) if cost == "slow" else 0.0  # what the one trial can cost
        assert with_drafts <= 1.03 * plain + worst


def test_drafts_pay_where_they_are_right():
    with_drafts, plain = simulated(COSTS["flat"], 0.9, 300)
    assert with_drafts < plain / 4
    with_drafts, plain = simulated(COSTS["free to 4, then linear"], 0.9, 300)
    assert with_drafts < plain / 2


def test_drafts_come_back_when_they_are_right_again():
    pace = Pace()
    for _ in range(10):
        pace.stepped(1.0)
    while length := pace.draft_length(4):
        pace.verified(length, 0, 4, 1.5)
    for _ in range(100):
        pace.stepped(1.0)
        pace.compared(4, 0, 1)
        assert pace.draft_length(4) == 0
    for _ in range(20):
        pace.stepped(1.0)
        pace.compared(4, 1, 1)
    assert pace.draft_length(4) > 0


def test_what_is_suggested_is_compared_while_nothing_is_drafted():
    pace = Pace()
    guesses = Drafter([1, 2, 3, 4, 1, 2], "auto", pace, stop_ids=(), vocab_size=9)
    before = pace._accepted[2]
    assert guesses.draft(3) == []  # no step was timed yet
    guesses.append(3)
    right, compared = pace._accepted[2]
    assert (right, compared) == (0.9 * before[0] + 1, 0.9 * before[1] + 1)


def test_compiling_for_a_new_length_does_not_stop_drafts():
    pace = Pace()
    for _ in range(5):
        pace.stepped(1.0)
    length = pace.draft_length(4)
    pace.verified(length, length, 4, 500.0)
    assert pace.draft_length(4) > length
    pace.verified(length, length, 4, 500.0)
    assert pace.draft_length(4) == 0


# The same answer


def greedy(**options):
    return SamplingParams(temperature=0.0, **options)


@pytest.mark.parametrize("speculate", LENGTHS)
def test_a_scripted_answer_is_the_same(speculate):
    model = fake_model(POEM, POEM)
    session = ChatSession(model)
    first = finish(session.send("Hi", sampling=greedy(speculate=speculate)))
    assert (first.text, first.reason) == (POEM.decode(), "stop")
    assert first.output_ids == (*POEM, EOT)
    second = finish(session.send("Go", sampling=greedy(speculate=speculate)))
    assert second.output_ids == (*POEM, EOT)
    assert second.usage.cached_tokens == len(b"Hi.") + len(POEM)
    assert model.runtime.prefills[1] == [EOT, *b"Go", EOT]
    if isinstance(speculate, int):
        assert len(model.runtime.reads) < 2 * (len(POEM) + 1)
        assert max(model.runtime.reads) == 1 + speculate


@pytest.mark.parametrize("speculate", [3, 8])
@pytest.mark.parametrize("limit", range(1, len(POEM) + 2))
def test_the_answer_ends_at_the_limit_wherever_it_falls(limit, speculate):
    model = fake_model(POEM, b"next")
    session = ChatSession(model)
    params = greedy(max_new_tokens=limit, speculate=speculate)
    finished = finish(session.send("Hi", sampling=params))
    assert finished.output_ids == (*POEM, EOT)[:limit]
    assert sum(model.runtime.reads) <= limit - 1 + speculate * len(model.runtime.reads)
    assert finish(session.send("Go")).text == "next"


@pytest.mark.parametrize("at", range(1, len(POEM) - 3, 3))
def test_a_stop_string_within_a_run_ends_the_answer_and_the_next_turn_is_right(at):
    model = fake_model(POEM, b"next")
    session = ChatSession(model)
    stop = POEM[at : at + 4].decode()
    params = greedy(stop=(stop,), speculate=8)
    finished = finish(session.send("Hi", sampling=params))
    assert finished.text == POEM.decode().split(stop)[0]
    said = len(finished.text.encode())
    assert finished.output_ids == tuple(POEM[: said + 4])
    following = finish(session.send("Go"))
    assert following.text == "next"
    assert following.usage.cached_tokens == len(b"Hi.") + said
    assert session.loaded.engine.cache.ids[: len(b"Hi.") + said] == [*b"Hi", EOT, *POEM[:said]]


@pytest.mark.parametrize("at", range(1, len(POEM), 5))
def test_an_interrupt_within_a_run_acts_within_one_step(at):
    session = ChatSession(fake_model(POEM, b"next"))
    count = 0
    for event in session.send("Hi", sampling=greedy(speculate=8)):
        if isinstance(event, TextDelta):
            count += 1
            if count == at:
                session.interrupt()
    said = event.output_ids
    assert event.reason == "interrupted"
    assert said == tuple(POEM[: len(said)])
    assert at <= len(said) <= at + 8
    assert finish(session.send("Go")).text == "next"


def test_logprobs_are_those_of_plain_steps():
    def noisy(logits):
        shift = torch.arange(logits.shape[1]) % 7 * 0.3
        return logits + shift

    found = []
    for speculate in ("off", 8):
        model = fake_model(POEM)
        model.runtime.logits_hook = noisy
        params = greedy(logprobs=3, speculate=speculate)
        found.append(finish(ChatSession(model).send("Hi", sampling=params)).logprobs)
    assert found[0] == found[1]
    assert len(found[0]) == len(POEM) + 1


@pytest.mark.parametrize("speculate", ["off", 8])
def test_logits_that_are_not_finite_within_a_run_are_an_error(speculate):
    model = fake_model(POEM)
    full_stops = itertools.count(1)

    def hook(logits):
        broken = int(logits.argmax()) == ord(".") and next(full_stops) == 2
        return logits * math.nan if broken else logits

    model.runtime.logits_hook = hook
    position = POEM.index(b".", POEM.index(b".") + 1) + 1
    with pytest.raises(NumericalError, match=f"at token {position};"):
        finish(ChatSession(model).send("Hi", sampling=greedy(speculate=speculate)))


# The same distribution


class MarkovRuntime:
    """The next token depends on the last one alone: logits are the rows of `table`."""

    def __init__(self, table):
        self.device, self.table = torch.device("cpu"), table

    def new_cache(self, slots, positions):
        return FakeCache(slots)

    def forward(self, batch, cache):
        cache.rows[0] += batch.token_ids.tolist()
        return self.table[batch.token_ids[list(batch.wanted)]]


def exact_distribution(table, params, start, length):
    """Probability of each continuation of `length` tokens, step by step as documented."""
    found = {}
    for tokens in itertools.product(range(len(table)), repeat=length):
        probability, said, last = 1.0, [], start
        for token in tokens:
            logits = table[last].double()
            counts = torch.bincount(torch.tensor(said, dtype=torch.long), minlength=len(table))
            seen = (counts > 0) | (torch.arange(len(table)) == start)
            r = params.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
            logits = logits - params.frequency_penalty * counts
            logits = logits - params.presence_penalty * (counts > 0)
            kept = filter_logits(logits / params.temperature, params)
            probability *= float(kept.softmax(-1)[token])
            said.append(token)
            last = token
        found[tokens] = probability
    return found


DISTRIBUTIONS = [
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 3, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.4},
    {"temperature": 1.0, "top_p": 1.0, "frequency_penalty": 0.8, "presence_penalty": 0.5},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", some(DISTRIBUTIONS, DISTRIBUTIONS[:1]))
def test_samples_with_drafts_follow_the_exact_distribution(options, monkeypatch):
    """Chi-square over all continuations of three tokens; half of the drafts are improbable."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * 1.5
    params, runs, start = SamplingParams(**options), 1500, 2
    expected = exact_distribution(table, params, start, 3)
    drafts = itertools.cycle([[0, 1], [3, 3], [1, 2], [2, 0], [1]])
    counts, accepted = Counter(), 0
    model = fake_model()
    model.runtime, model.vocab_size = MarkovRuntime(table), 4
    engine = Engine(model)
    for seed in range(runs):
        guesses = drafter([], speculate=2)
        guesses.draft = lambda most: next(drafts)[:most]
        monkeypatch.setattr("mmchat.engine.row.Drafter", lambda *_, made=guesses, **__: made)
        sampling = replace(params, seed=seed, max_new_tokens=3)
        request = Request(Prompt((start,)), sampling, ignore_stop=True)
        events = [event for _, event in run(engine, [engine.submit(request)])]
        counts[events[-1].output_ids] += 1
        accepted += sum(right for right, _ in guesses._pace._accepted.values())
    assert accepted > runs / 4
    assert all(expected[tokens] > 0 for tokens in counts)
    likely = [tokens for tokens in expected if expected[tokens] * runs >= 5]
    rest = runs - sum(counts[tokens] for tokens in likely)
    cells = [(counts[tokens], expected[tokens] * runs) for tokens in likely]
    cells.append((rest, max(runs - sum(mean for _, mean in cells), 1e-9)))
    cells = [(seen, mean) for seen, mean in cells if mean >= 5]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # beyond four standard deviations


# The same tokens on real models


class Guesses(Drafter):
    """Drafts the right tokens, but for some that are changed at random."""

    right: tuple[int, ...] = ()
    chance = random.Random(0)
    verified_tokens = 0

    def __init__(self, ids, speculate, pace, *, stop_ids, vocab_size):
        super().__init__((), speculate, pace, stop_ids=stop_ids, vocab_size=vocab_size)
        self._said = 0

    def append(self, token_id):
        self._said += 1

    def draft(self, most):
        most = min(most, self.chance.randint(0, 5))
        tokens = list(self.right[self._said : self._said + most])
        if tokens and self.chance.random() < 0.4:
            at = self.chance.randrange(len(tokens))
            tokens[at] = (tokens[at] + 1 + self.chance.randrange(50)) % self._vocab_size
        return tokens

    def verified(self, drafted, accepted, seconds):
        Guesses.verified_tokens += accepted


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    config = small_config()
    folder = tmp_path_factory.mktemp("models") / "random"
    return mmchat.load(write_hf_folder(folder, config, random_weights(config)), device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return mmchat.load("tiny", device="cpu")


TURNS = (
    ("What is it?", ["street.jpg"]),
    ("What is it?", []),
    ("And these?", ["before.jpg", "after.jpg"]),
    ("Say it again.", []),
)
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 5},
    "all": {
        "temperature": 1.2, "top_k": 40, "min_p": 0.01, "presence_penalty": 0.5,
        "repetition_penalty": 1.1, "seed": 9,
    },
}  # fmt: skip


@pytest.mark.parametrize("sampling", some(SAMPLINGS, {"greedy", "all"}))
@pytest.mark.parametrize("which", ["random_model", "tiny"])
def test_several_turns_with_pictures_say_the_same(which, sampling, request, monkeypatch):
    model = request.getfixturevalue(which)
    params = SamplingParams(**{**SAMPLINGS[sampling], "max_new_tokens": 24, "speculate": "off"})
    vars(model).pop("engine", None)  # with all that it has read
    plain = ChatSession(model)
    expected = [finish(plain.send(text, paths(names), params)) for text, names in TURNS]
    vars(model).pop("engine")
    monkeypatch.setattr("mmchat.engine.row.Drafter", Guesses)
    monkeypatch.setattr(Guesses, "verified_tokens", 0)
    session = ChatSession(model)
    for (text, names), wanted in zip(TURNS, expected, strict=True):
        monkeypatch.setattr(Guesses, "right", wanted.output_ids)
        got = finish(session.send(text, paths(names), params))
        assert got.output_ids == wanted.output_ids
        assert (got.text, got.reason) == (wanted.text, wanted.reason)
        assert got.usage == wanted.usage
        [slot] = model.engine.prefixes.slots
        assert session.loaded.engine.cache.lengths == [len(slot.marks)]
    assert Guesses.verified_tokens > 10


@pytest.mark.parametrize("speculate", [2, 5, "auto"])
def test_the_built_in_model_says_the_same_with_lookup(tiny, speculate):
    for text, names in (("What is it?", ["dog.jpg"]), ("Repeat: a b c d a b c d a b", [])):
        plain = finish(ChatSession(tiny).send(text, paths(names), greedy(speculate="off")))
        got = finish(ChatSession(tiny).send(text, paths(names), greedy(speculate=speculate)))
        assert got.output_ids == plain.output_ids


def paths(names):
    return [Path(__file__).parents[2] / "assets" / name for name in names]
