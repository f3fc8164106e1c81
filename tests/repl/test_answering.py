import os
import signal
import threading
import time

import pytest

from mmchat.engine.events import Progress, TextDelta
from mmchat.repl.answering import HardStop, batches, interrupts


def deltas(count, seconds=0.0):
    for n in range(count):
        time.sleep(seconds)
        yield TextDelta(str(n), n)


def test_every_event_comes_once_and_in_order():
    found = [event for batch in batches(deltas(500), 0.01) for event in batch]
    assert [event.token_id for event in found] == list(range(500))


def test_a_fast_model_does_not_wake_the_reader_for_each_token():
    assert len([b for b in batches(deltas(300, 0.001), 0.1) if b]) < 30


def test_waiting_is_told_by_empty_batches():
    found = list(batches(deltas(1, 0.2), 0.02))
    assert [] in found
    assert [event for batch in found for event in batch] == [TextDelta("0", 0)]


def test_the_model_runs_in_another_thread_and_its_error_is_raised_here():
    def failing():
        yield Progress(threading.current_thread().name)
        raise ValueError("from the model")

    found = batches(failing(), 0.01)
    assert next(found) == [Progress("model")]
    with pytest.raises(ValueError, match="from the model"):
        list(found)


@pytest.mark.process
def test_the_first_interrupt_stops_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)
    stopped = []
    with interrupts(lambda: stopped.append(True)):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [True]
        with pytest.raises(HardStop):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
