"""Many conversations at once: each asks its next question when the one before is answered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import TypeVar

from mmchat.engine.engine import Engine
from mmchat.engine.events import Finished
from mmchat.engine.request import Answer, Request
from mmchat.errors import MmchatError

T = TypeVar("T")
# Gives requests, is sent their ends or their errors, and returns what came of it.
Talk = Generator[Request, Finished, T]


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
