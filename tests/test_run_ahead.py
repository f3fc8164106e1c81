"""Queueing the next step before a token is known on the host changes no answer."""

import math

import pytest

from mmchat.chat.session import ChatSession
from mmchat.engine import row
from mmchat.engine.events import Finished, TextDelta
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import NumericalError
from tests.fake_model import EOT, fake_model

ANSWER = b"A dog and a fox."


@pytest.fixture(autouse=True)
def device_that_works_by_itself(monkeypatch):
    monkeypatch.setattr(row, "is_asynchronous", lambda device: True)


def greedy(**options):
    return SamplingParams(**{"temperature": 0.0, "speculate": "off", **options})


def finish(events):
    *_, last = events
    assert isinstance(last, Finished)
    return last


@pytest.fixture
def order(monkeypatch):
    """What happened in turn: "read" a token on the host, "step" on the device."""
    happened = []
    read = row.HostCopy.read

    def recorded(copy):
        happened.append("read")
        return read(copy)

    monkeypatch.setattr(row.HostCopy, "read", recorded)
    return happened


def watched_model(order, *answers):
    model = fake_model(*answers)
    forward = model.runtime.forward

    def recorded(batch, cache):
        if not cache.begun and batch.counts == (1,):
            order.append("step")
        return forward(batch, cache)

    model.runtime.forward = recorded
    return model


def test_the_next_step_is_queued_before_a_token_is_read(order):
    model = watched_model(order, ANSWER)
    finished = finish(ChatSession(model).send("Hi", sampling=greedy()))
    assert finished.output_ids == (*ANSWER, EOT)
    # the step after the stop token is the only one that nobody needed
    assert order == ["step", "read"] * (len(ANSWER) + 1)


def test_no_step_is_queued_past_the_limit(order):
    model = watched_model(order, ANSWER)
    finished = finish(ChatSession(model).send("Hi", sampling=greedy(max_new_tokens=4)))
    assert finished.output_ids == tuple(ANSWER[:4])
    assert order == ["step", "read"] * 3 + ["read"]


def test_a_token_is_shown_while_the_next_step_runs():
    model = fake_model(ANSWER)
    shown = 0
    for event in ChatSession(model).send("Hi", sampling=greedy()):
        if isinstance(event, TextDelta) and event.token_id is not None:
            shown += 1
            assert len(model.runtime.reads) == shown


def test_what_nobody_needed_is_not_reused():
    model = fake_model(b"one", b"two", b"three")
    session = ChatSession(model)
    finish(session.send("Hi", sampling=greedy()))
    assert session.loaded.engine.cache.ids == [*b"Hi", EOT, *b"one"]
    finished = finish(session.send("Go", sampling=greedy(max_new_tokens=2)))
    assert model.runtime.prefills[1] == [EOT, *b"Go", EOT]
    assert finished.usage.cached_tokens == len(b"Hi.one")
    assert session.loaded.engine.cache.ids[-4:] == [*b"Go", EOT, ord("t")]
    assert finish(session.send("Go", sampling=greedy())).text == "three"


@pytest.mark.parametrize("at", [1, 2, 7])
def test_an_interrupt_acts_within_one_token(at):
    session = ChatSession(fake_model(ANSWER, b"next"))
    count = 0
    for event in session.send("Hi", sampling=greedy()):
        if isinstance(event, TextDelta):
            count += 1
            if count == at:
                session.interrupt()
    assert (event.reason, event.output_ids) == ("interrupted", tuple(ANSWER[:at]))
    assert session.loaded.engine.cache.ids == [*b"Hi", EOT, *ANSWER[: at - 1]]
    assert finish(session.send("Go", sampling=greedy())).text == "next"


def test_a_stop_string_ends_the_answer():
    session = ChatSession(fake_model(ANSWER, b"next"))
    finished = finish(session.send("Hi", sampling=greedy(stop=("and",))))
    assert (finished.text, finished.reason) == ("A dog ", "stop_string")
    assert finish(session.send("Go", sampling=greedy())).text == "next"


def test_logits_that_are_not_finite_are_an_error_and_no_token_is_read_for_them():
    model = fake_model(ANSWER)
    fed = []
    forward = model.runtime.forward

    def recorded(batch, cache):
        fed.extend(batch.token_ids.tolist())
        return forward(batch, cache)

    model.runtime.forward = recorded
    model.runtime.logits_hook = lambda logits: (
        logits * math.nan if int(logits.argmax()) == ord("g") else logits
    )
    with pytest.raises(NumericalError, match="token 5;"):
        finish(ChatSession(model).send("Hi", sampling=greedy()))
    assert min(fed) >= 0


def test_log_probabilities_are_read_one_step_at_a_time(order):
    model = watched_model(order, ANSWER)
    finished = finish(ChatSession(model).send("Hi", sampling=greedy(logprobs=1)))
    assert len(finished.logprobs) == len(ANSWER) + 1
    assert order[:3] == ["read", "step", "read"]


@pytest.mark.parametrize("speculate", [2, 6, "auto"])
def test_drafts_wait_for_the_token_and_give_the_same_answer(order, speculate):
    poem = b"the cat sat on the mat. the cat sat on the hat. the cat sat."
    model = watched_model(order, poem)
    finished = finish(ChatSession(model).send("Hi", sampling=greedy(speculate=speculate)))
    assert finished.output_ids == (*poem, EOT)
    assert order[:4] == ["step", "read"] * 2
    if speculate != "auto":
        assert max(model.runtime.reads) == 1 + speculate
        assert len(model.runtime.reads) < len(poem)
