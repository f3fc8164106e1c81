"""Runs the model in a thread of its own while the main thread owns the terminal and the signals."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from mmchat.engine.events import Event


class HardStop(Exception):  # noqa: N818 - not an error
    """Ctrl-C was pressed again while an answer was being stopped."""


def batches(events: Iterable[Event], frame_seconds: float) -> Iterator[list[Event]]:
    """Events of a generator that runs in a thread, at most one batch in `frame_seconds`.

    Taking them one by one would wake this thread for each token, which slows a fast model. An empty
    list says that nothing came for a frame. What the generator raises is raised here. The thread
    does not keep the process alive.
    """
    ready: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        end = None
        try:
            for event in events:
                ready.put(event)
        except BaseException as error:
            end = error
        ready.put(end)

    threading.Thread(target=work, name="model", daemon=True).start()
    due = time.monotonic()
    while True:
        batch: list[Event] = []
        try:
            item = ready.get(timeout=frame_seconds)
            time.sleep(max(0.0, due - time.monotonic()))
            due = time.monotonic() + frame_seconds
            while isinstance(item, Event):
                batch.append(item)
                item = ready.get_nowait()
        except queue.Empty:
            yield batch
            continue
        if batch:
            yield batch
        if item is not None:
            raise item
        return


@contextmanager
def interrupts(stop: Callable[[], None], again: type[BaseException] = HardStop) -> Iterator[None]:
    """The first Ctrl-C within the block calls `stop`, the next one raises `again`.

    A process that ignores SIGINT (a background job) goes on ignoring it.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.SIG_IGN:
        yield
        return
    pressed = False

    def on_interrupt(_signal_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise again
        pressed = True
        stop()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.default_int_handler)
