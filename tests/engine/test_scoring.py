"""Log-probabilities of a prompt: those of a plain forward, however it is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import mmchat
from mmchat.conversation import Message, Text
from mmchat.engine.driver import run
from mmchat.engine.engine import Engine
from mmchat.engine.request import Request
from mmchat.engine.sampling import SCORED_AT_ONCE, PromptScores, SamplingParams
from mmchat.errors import NumericalError
from mmchat.models.base import Batch
from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.prompt import PlacedMedia, Prompt
from mmchat.nn.linear import Linear

TOP = 5
PARAMS = SamplingParams(temperature=0.0, max_new_tokens=3, logprobs=TOP)
TEXT = "A red circle is left of a blue square. The dog is brown, the fish is orange. " * 6


@pytest.fixture(scope="module")
def tiny():
    return mmchat.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def prompt(tiny):
    return tiny.processor.raw(Message("user", (Text(TEXT),)))


def plain(model, prompt):
    """Log-probabilities [N, V] after each position, of one forward."""
    cache = model.runtime.new_cache(1, len(prompt.token_ids))
    cache.begin(0, prompt)
    with torch.inference_mode():
        batch = Batch.all_of(torch.tensor(prompt.token_ids), 0)
        return model.runtime.forward(batch, cache).log_softmax(-1)


def scored(engine, prompt, start=1):
    [*_, (_, end)] = run(engine, [engine.submit(Request(prompt, PARAMS, score_from=start))])
    return end


def check(model, prompt, entries, start=1):
    assert [entry.token_id for entry in entries] == list(prompt.token_ids[start:])
    expected = plain(model, prompt)
    for before, entry in enumerate(entries, start=start - 1):
        row = expected[before]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        best = row.topk(TOP).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-4)
        assert all(a >= b for (_, a), (_, b) in pairwise(entry.top))


@pytest.mark.parametrize("start", [1, 2, 70, SCORED_AT_ONCE, SCORED_AT_ONCE + 1, -1, 0])
def test_they_are_those_of_a_plain_forward(tiny, prompt, start):
    assert len(prompt.token_ids) > 2 * SCORED_AT_ONCE
    start = start if start > 0 else len(prompt.token_ids) + start
    end = scored(Engine(tiny), prompt, start)
    check(tiny, prompt, end.prompt_logprobs, start)
    assert end.output_ids == scored(Engine(tiny), prompt, 1).output_ids
    assert len(end.logprobs) == len(end.output_ids)


def test_what_is_cached_is_read_again_as_far_as_it_is_scored(tiny, prompt):
    engine = Engine(tiny, rows=2)
    scored(engine, prompt)
    for start in (1, 40, 100):
        end = scored(engine, prompt, start)
        assert end.usage.cached_tokens == (start - 1 if start > 1 else 0)
        check(tiny, prompt, end.prompt_logprobs, start)


def test_others_write_on_meanwhile_and_nobody_disturbs_anybody(tiny, prompt):
    engine = Engine(tiny, rows=3)
    params = replace(PARAMS, max_new_tokens=30)
    other = tiny.processor.chat([Message("user", (Text("What do you see?"),))])
    writing = engine.submit(Request(other, params, ignore_stop=True))
    for _ in range(4):
        engine.step()
    short = Prompt(prompt.token_ids[:90])
    asked = [engine.submit(Request(one, PARAMS, score_from=1)) for one in (prompt, short)]
    list(run(engine, [writing, *asked]))
    for answer, one in zip(asked, (prompt, short), strict=True):
        check(tiny, one, answer.finished.prompt_logprobs)
    assert len(writing.finished.output_ids) == 30


def test_no_idle_slot_is_computed_beside_it_where_steps_take_all(tiny, prompt, monkeypatch):
    def made(*args, **given):
        return MllamaCache(*args, **{**given, "fixed": True})

    monkeypatch.setattr(MllamaForConditionalGeneration, "cache_type", staticmethod(made))
    rows = []
    head = Linear.forward

    def counted(layer, x):
        if layer.out_features == tiny.vocab_size:
            rows.append(x.shape[:-1].numel())
        return head(layer, x)

    monkeypatch.setattr(Linear, "forward", counted)
    end = scored(Engine(tiny, rows=8), prompt)
    read = len(prompt.token_ids) // SCORED_AT_ONCE + 1
    assert max(rows[:read]) == SCORED_AT_ONCE
    assert rows[-1] == 8
    check(tiny, prompt, end.prompt_logprobs)


def test_without_score_from_nothing_is_scored_and_the_last_position_is_enough():
    scores = PromptScores(range(1000), None, 0)
    assert scores.end(0, 1000) == 1000
    assert scores.wanted(0, 1000) == (999,)
    scores.read(torch.zeros(1, 4), 1000)
    assert scores.entries == []


@pytest.mark.parametrize("first", [1, 2, 30, 64, 65, 66, 130, 199, 200])
@pytest.mark.parametrize("most", [7, 64, 512])
def test_each_token_is_scored_once_from_at_most_so_many_rows(first, most):
    ids = [at % 9 for at in range(200)]
    scores = PromptScores(ids, first, 2)
    start = 0
    while start < len(ids):
        end = scores.end(start, min(start + most, len(ids)))
        wanted = scores.wanted(start, end)
        assert len(wanted) <= SCORED_AT_ONCE
        assert wanted[-1] == end - start - 1
        logits = torch.zeros(len(wanted), 9)
        for row, at in enumerate(wanted):
            logits[row, (start + at + 1) % 9] = 50.0  # each position is sure of the next
        scores.read(logits, end)
        start = end
    assert [entry.token_id for entry in scores.entries] == ids[first:]
    assert all(entry.logprob > -1e-6 for entry in scores.entries)


def test_what_is_not_finite_ends_it():
    with pytest.raises(NumericalError, match="in the prompt"):
        PromptScores([1, 2, 3], 1, 0).read(torch.full((3, 4), torch.nan), 3)


@pytest.mark.parametrize("start", [0, -1, 3])
def test_nothing_is_scored_before_a_picture(start):
    media = (PlacedMedia(3, 1, SimpleNamespace(content_hash="p")),) if start > 0 else ()
    with pytest.raises(ValueError, match="score_from must be"):
        Request(Prompt((1, 2, 3, 9, 5), media), PARAMS, score_from=start)
