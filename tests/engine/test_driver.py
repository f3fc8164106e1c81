"""An engine in a thread of its own: readers anywhere, every answer ends."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from mmchat.engine import driver
from mmchat.engine.driver import EngineThread
from mmchat.engine.engine import Engine
from mmchat.engine.events import Finished
from mmchat.engine.request import Answer
from mmchat.errors import MemoryError_
from tests.engine.test_engine import GUILTY, expected, fake_model
from tests.engine.test_room import ROW, counted_model, request


def last(events):
    *_, end = events
    assert isinstance(end, Finished)
    return end.output_ids


def wait_for(condition) -> None:
    """Until another thread has done something."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_answers_read_in_many_threads_are_right():
    found = {}

    def read(number: int) -> None:
        for turn in range(20):
            asked = request(number, turn, 3)
            found[number, turn] = last(thread.read(asked)) == expected(asked.prompt, 12)

    with EngineThread(Engine(fake_model(), rows=3)) as thread:
        readers = [threading.Thread(target=read, args=(number,)) for number in range(5)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert len(found) == 100
    assert all(found.values())


def test_an_event_loop_is_told_and_never_waits():
    async def ask(thread: EngineThread, number: int) -> bool:
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        asked = request(number, 4)
        answer = thread.submit(asked, lambda: loop.call_soon_threadsafe(came.set))
        while answer.has_more:
            await came.wait()
            came.clear()
            answer.take()
        assert answer.finished is not None
        return answer.finished.output_ids == expected(asked.prompt, 12)

    async def everybody(thread: EngineThread) -> list[bool]:
        return await asyncio.gather(*(ask(thread, number) for number in range(30)))

    with EngineThread(Engine(fake_model(), rows=4)) as thread:
        assert all(asyncio.run(everybody(thread)))


def test_submit_does_not_wait_for_a_long_step(monkeypatch):
    model = fake_model()
    steps, forward = threading.Event(), model.runtime.forward

    def slow(batch, cache):
        assert steps.wait(20)
        return forward(batch, cache)

    monkeypatch.setattr(model.runtime, "forward", slow)
    with EngineThread(Engine(model, rows=2)) as thread:
        first = thread.submit(request(1, 2))
        wait_for(lambda: any(slot.is_taken for slot in thread.engines[0].prefixes.slots))
        second = thread.submit(request(3, 4))  # while the step above cannot end
        thread.cancel(second)
        steps.set()
        wait_for(lambda: first.is_over and second.is_over)
    assert second.finished is not None
    assert second.finished.reason == "interrupted"


def test_a_reader_that_stops_cancels_its_answer():
    with EngineThread(Engine(fake_model(), rows=2)) as thread:
        asked = request(1, 2, 3, most=5_000)
        reading = thread.read(asked)
        next(reading)
        reading.close()
        wait_for(lambda: not thread.engines[0].has_work)
        assert not any(slot.is_taken for slot in thread.engines[0].prefixes.slots)


def test_a_failure_of_one_answer_is_raised_to_its_reader_alone():
    with EngineThread(Engine(fake_model(), rows=2)) as thread:
        good = request(1, 2)
        with pytest.raises(RuntimeError, match="the step fails"):
            list(thread.read(request(GUILTY)))
        assert last(thread.read(good)) == expected(good.prompt, 12)
        assert thread.is_alive


def test_a_reader_that_cannot_be_told_costs_nobody_else_an_answer():
    """As an event loop that was closed."""

    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    with EngineThread(Engine(fake_model(), rows=2)) as thread:
        gone = [thread.submit(request(number, 3, most=5_000), closed) for number in range(3)]
        good = request(7, 8)
        assert last(thread.read(good)) == expected(good.prompt, 12)
        wait_for(lambda: not thread.engines[0].has_work)
        assert thread.is_alive
    assert all(answer.is_over and answer.error is None for answer in gone)


def test_what_can_never_fit_is_refused_at_once():
    with EngineThread(Engine(counted_model(), memory=ROW)) as thread:
        with pytest.raises(MemoryError_):
            thread.submit(request(1, most=5_000))
        assert thread.is_alive


def test_memory_goes_back_once_when_nobody_asks_any_more(monkeypatch):
    returned = []
    monkeypatch.setattr(driver, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(driver, "return_freed_memory", lambda: returned.append(True))
    with EngineThread(Engine(fake_model(), rows=1)) as thread:
        for times in (1, 2, 3):
            wait_for(lambda times=times: len(returned) == times)
            time.sleep(0.2)
            assert len(returned) == times
            asked = request(1, 2)
            assert last(thread.read(asked)) == expected(asked.prompt, 12)


def test_closing_ends_every_answer():
    thread = EngineThread(Engine(fake_model(), rows=1))
    answers = [thread.submit(request(number, 9, most=100_000)) for number in range(3)]
    endless = [answer for answer in answers if not answer.is_over]
    thread.close()
    assert not thread.is_alive
    assert all(answer.is_over for answer in answers)
    assert [str(a.error) for a in endless if a.error] in (
        [],
        *[["the engine's thread was closed"] * n for n in (1, 2, 3)],
    )
    with pytest.raises(RuntimeError, match="has ended"):
        thread.submit(request(1))
    thread.close()  # twice does no harm


def test_a_thread_that_dies_ends_every_answer_with_the_reason(monkeypatch):
    engine = Engine(fake_model(), rows=2)

    def broken() -> bool:
        raise SystemError("a bug")

    monkeypatch.setattr(engine, "step", broken)
    thread = EngineThread(engine)
    told: list[Answer] = []
    answers = [engine.submit(request(number), lambda: told.append(answers[0])) for number in (1, 2)]
    with pytest.raises(SystemError, match="a bug"):
        list(thread.read(request(5)))
    wait_for(lambda: not thread.is_alive)
    assert [type(answer.error) for answer in answers] == [SystemError] * 2
    assert len(told) == 2
    assert isinstance(thread.error, SystemError)
