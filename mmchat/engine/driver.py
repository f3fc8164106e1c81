"""Who steps an engine: the caller's thread, for some answers or many talks, or one of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from mmchat.engine.engine import Engine
from mmchat.engine.events import Event, Finished
from mmchat.engine.request import Answer, Request
from mmchat.errors import MmchatError
from mmchat.hardware.memory import return_freed_memory

T = TypeVar("T")
# Gives requests, is sent their ends or their errors, and returns what came of it.
Talk = Generator[Request, Finished, T]
_IDLE_SECONDS = 1.0  # then memory goes back, which costs who comes next some ms


def run(engine: Engine, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Event]]:
    """Step until all of `answers` are over, and give their events as they come.

    A reader that stops cancels them. Raises the error of the first that fails.
    """
    try:
        while True:
            for answer in answers:
                for event in answer.take():
                    yield answer, event
                if answer.error is not None:
                    raise answer.error
            if not any(answer.has_more for answer in answers):
                return
            engine.step()
    finally:
        for answer in answers:
            if not answer.is_over:
                engine.cancel(answer)


def hold(engine: Engine, talks: Iterable[Talk[T] | None], *, in_order: bool = True) -> Iterator[T]:
    """What each of `talks` returns; as many are held at once as there are rows.

    Talks are begun when there is room for them, so their pictures need not all be in memory.
    in_order: of the talks; otherwise as they end, and None says that the next one is not ready: go
    on with those that are held. Raises the first error that a talk does not catch. A reader that
    stops cancels the rest.
    """
    coming = enumerate(talks)
    going: dict[Answer, tuple[int, Talk[T]]] = {}
    done: dict[int, T] = {}
    told, is_more = 0, True

    def go_on(number: int, talk: Talk[T], advance: Callable[[], Request]) -> None:
        while True:
            try:
                request = advance()
            except StopIteration as stop:
                done[number] = stop.value
                return
            try:
                going[engine.submit(request)] = number, talk
                return
            except MmchatError as error:
                advance = partial(talk.throw, error)

    try:
        while is_more or going:
            while is_more and len(going) < engine.rows and (in_order or not done):
                upcoming = next(coming, None)
                if upcoming is None:
                    is_more = False
                    break
                number, talk = upcoming
                if talk is None:
                    break
                go_on(number, talk, partial(next, talk))
            engine.step()
            for answer in [answer for answer in going if answer.is_over]:
                number, talk = going.pop(answer)
                if answer.finished is None:
                    error = answer.error or RuntimeError("an answer ended without its end")
                    go_on(number, talk, partial(talk.throw, error))
                else:
                    go_on(number, talk, partial(talk.send, answer.finished))
            while told in done or (done and not in_order):
                yield done.pop(told if in_order else next(iter(done)))
                told += 1
    finally:
        for answer in going:
            engine.cancel(answer)


class EngineThread:
    """A thread that steps engines in turn, whenever there is something to do.

    Readers may be in any thread, or in an event loop: `submit` does not wait, and `tell` is called
    in this thread whenever something can be taken. `close` it, or use it in a `with`.
    """

    def __init__(self, *engines: Engine) -> None:
        self.engines = engines
        self.error: BaseException | None = None  # why the thread ended, if it was not closed
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="mmchat engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self,
        request: Request,
        tell: Callable[[], object] | None = None,
        engine: Engine | None = None,
    ) -> Answer:
        """Put a request in the queue of `engine`, else of the first one.

        Raises MemoryError_, and RuntimeError after the end.
        """
        with self._changed:
            if self._is_closing or self.error is not None:
                raise RuntimeError("the engine's thread has ended") from self.error
            answer = (engine or self.engines[0]).submit(request, tell)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer before its next token or slice; does not wait for that."""
        answer.cancel()
        with self._changed:
            self._changed.notify()

    def read(self, request: Request) -> Iterator[Event]:
        """Submit, and give the events as they come. A reader that stops cancels the answer.

        Raises what `submit` does, and the error that ends the answer.
        """
        came = threading.Event()
        answer = self.submit(request, came.set)
        try:
            while True:
                came.wait()
                came.clear()
                yield from answer.take()
                if answer.error is not None:
                    raise answer.error
                if not answer.has_more:
                    return
        finally:
            if not answer.is_over:
                self.cancel(answer)

    def close(self) -> None:
        """End the thread after its step; answers that are not over fail."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        error: BaseException = RuntimeError("the engine's thread was closed")
        try:
            while self._has_work():
                for engine in self.engines:
                    if engine.has_work:
                        engine.step()
        except BaseException as failure:
            error = self.error = failure
        with self._changed:
            self._is_closing = True
        for engine in self.engines:
            engine.fail(error)

    def _has_work(self) -> bool:
        """Wait until there is something to do; False once it is closed."""
        if not self._is_called(_IDLE_SECONDS):
            return_freed_memory()
            self._is_called()
        return not self._is_closing

    def _is_called(self, seconds: float | None = None) -> bool:
        """Wait until there is something to do or it is closed; False if time ran out before."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_closing or any(engine.has_work for engine in self.engines), seconds
            )
