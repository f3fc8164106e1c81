import math
import threading

import pytest
import torch

from mmchat.chat.session import ChatSession
from mmchat.engine.events import Finished, TextDelta
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import ContextLengthExceeded, NumericalError, UsageError
from tests.fake_model import EOT, fake_model


def finish(events):
    *_, last = events
    assert isinstance(last, Finished)
    return last


def test_an_answer_is_its_deltas_and_ends_at_the_stop_token():
    events = list(ChatSession(fake_model(b"A dog.")).send("Hi"))
    finished = finish(events)
    assert finished.text == "A dog."
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "A dog."
    assert finished.reason == "stop"
    assert finished.output_ids == (*b"A dog.", EOT)
    assert finished.prompt_ids == (*b"Hi", EOT)
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 7)
    assert finished.timings.time_to_first_token > 0
    assert finished.timings.load_seconds == 0.5


def test_the_answer_ends_at_max_new_tokens():
    params = SamplingParams(temperature=0.0, max_new_tokens=3)
    finished = finish(ChatSession(fake_model(b"A dog.")).send("Hi", sampling=params))
    assert (finished.text, finished.reason) == ("A d", "length")


def test_the_answer_ends_where_the_context_ends():
    finished = finish(ChatSession(fake_model(b"A dog.", max_seq_len=5)).send("Hi"))
    assert (finished.text, finished.reason) == ("A ", "length")


def test_a_prompt_as_long_as_the_context_is_refused_before_any_compute():
    model = fake_model(b"", max_seq_len=5)
    with pytest.raises(ContextLengthExceeded, match="5 tokens and the context 5"):
        list(ChatSession(model).send("1234"))
    assert model.runtime.prefills == []


def test_a_stop_string_ends_the_answer_and_is_not_in_it():
    params = SamplingParams(temperature=0.0, stop=("dog",))
    finished = finish(ChatSession(fake_model(b"A dog.")).send("Hi", sampling=params))
    assert (finished.text, finished.reason) == ("A ", "stop_string")


def test_later_turns_read_only_what_is_new():
    model = fake_model(b"one", b"two")
    session = ChatSession(model)
    finish(session.send("Hi"))
    finished = finish(session.send("Go"))
    assert model.runtime.prefills[0] == [*b"Hi", EOT]
    assert model.runtime.prefills[1] == [EOT, *b"Go", EOT]
    assert finished.usage.cached_tokens == len(b"Hi.one")
    assert [m.text for m in session.messages] == ["Hi", "one", "Go", "two"]


def test_reset_keeps_the_system_prompt():
    session = ChatSession(fake_model(b"one", b"two"), system="Be brief.")
    finish(session.send("Hi"))
    session.reset()
    assert [m.role for m in session.messages] == ["system"]


def test_interrupting_keeps_what_was_said():
    session = ChatSession(fake_model(b"A long answer", b"next"))
    seen = []
    for event in session.send("Hi"):
        seen.append(event)
        if isinstance(event, TextDelta) and len(seen) == 4:
            threading.Thread(target=session.interrupt).start()
            session._interrupt.wait()
    finished = finish(seen)
    assert finished.reason == "interrupted"
    assert b"A long answer".startswith(finished.text.encode())
    assert len(finished.text) <= 4
    assert session.messages[-1].text == finished.text
    assert finish(session.send("Go")).text == "next"


def test_a_failed_turn_leaves_the_conversation_as_it_was():
    model = fake_model(b"one", b"broken", b"two")
    session = ChatSession(model)
    finish(session.send("Hi"))
    before = list(session.messages)
    model.runtime.fail_at = 3
    with pytest.raises(RuntimeError, match="scripted"):
        list(session.send("Go"))
    assert session.messages == before
    model.runtime.fail_at = None
    finished = finish(session.send("Go"))
    assert finished.text == "two"
    assert model.runtime.prefills[-1][-3:] == [*b"Go", EOT]


def test_an_abandoned_answer_leaves_the_conversation_as_it_was():
    session = ChatSession(fake_model(b"one", b"two"))
    events = session.send("Hi")
    next(event for event in events if isinstance(event, TextDelta))
    events.close()
    assert session.messages == []
    assert finish(session.send("Hi")).text == "two"


def test_a_turn_that_was_overtaken_does_not_undo_the_one_that_was_kept():
    session = ChatSession(fake_model(b"two", b"one"))
    first = session.send("Hi")
    next(first)
    finish(session.send("Go"))
    with pytest.raises(UsageError, match="another question was asked before"):
        list(first)
    assert [message.text for message in session.messages] == ["Go", "two"]


def test_a_question_after_one_whose_reader_stopped_is_answered_at_once():
    model = fake_model(b"a very long answer", b"two")
    session = ChatSession(model)
    events = session.send("Hi")
    next(event for event in events if isinstance(event, TextDelta))
    read = len(model.runtime.reads)
    assert finish(session.send("Go")).text == "two"
    assert len(model.runtime.reads) == read + len(b"two")
    with pytest.raises(UsageError, match="another question was asked before"):
        next(events)
    assert [m.text for m in session.messages] == ["Go", "two"]


def test_stopping_to_read_at_finished_keeps_the_turn():
    session = ChatSession(fake_model(b"one"))
    for event in session.send("Hi"):
        if isinstance(event, Finished):
            break
    assert [m.text for m in session.messages] == ["Hi", "one"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    model = fake_model(b"one")
    model.runtime.logits_hook = lambda logits: logits.index_fill(1, torch.tensor([5]), bad)
    with pytest.raises(NumericalError, match="token 1"):
        list(ChatSession(model).send("Hi"))


def test_logprobs_are_those_of_the_model():
    params = SamplingParams(temperature=0.0, logprobs=2)
    finished = finish(ChatSession(fake_model(b"x")).send("Hi", sampling=params))
    first = finished.logprobs[0]
    expected = 20 - math.log(math.exp(20) + 259)
    assert first.token_id == ord("x")
    assert first.logprob == pytest.approx(expected, abs=1e-5)
    assert first.top[0] == (ord("x"), pytest.approx(expected, abs=1e-5))
    assert len(first.top) == 2


def test_pictures_need_a_model_that_was_loaded_with_vision():
    with pytest.raises(UsageError, match="text only"):
        list(ChatSession(fake_model(b"x", text_only=True)).send("Hi", images=["a.png"]))


def test_complete_continues_raw_text():
    model = fake_model(b"world")
    finished = finish(ChatSession(model).complete("Hello "))
    assert finished.text == "world"
    assert model.runtime.prefills == [list(b"Hello ")]
