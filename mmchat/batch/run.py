"""Answers rows by one model: pictures are read ahead of it, and what ends makes room at once."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmchat.batch.rows import Asked, Row
from mmchat.chat import foreign
from mmchat.chat.session import check_message, user_message
from mmchat.conversation import Message, finish_reason
from mmchat.engine.driver import Talk, hold
from mmchat.engine.events import Finished, Timings
from mmchat.engine.request import Request
from mmchat.engine.room import usual_rows
from mmchat.errors import MmchatError, UsageError
from mmchat.hardware.allocation import memory_errors
from mmchat.images import worker

if TYPE_CHECKING:
    from mmchat.engine.engine import Engine
    from mmchat.engine.sampling import SamplingParams
    from mmchat.loading.loader import LoadedModel

MOST_READERS = 8
MOST_AHEAD = 16  # pictures that are laid out and wait, of up to 15 MB each
Line = dict[str, Any]  # what is written of a row


@dataclass(frozen=True)
class Defaults:
    """What is asked of rows that say nothing else."""

    prompt: str
    system: str | None
    sampling: SamplingParams


@dataclass(frozen=True)
class Outcome:
    """What came of a row. asked: its `input`, the hash of what was asked.

    end: the request before it was answered.
    """

    row: Row
    asked: str
    is_openai: bool
    end: Request | Finished | MmchatError

    def record(self, model: str) -> Line:
        """What its line says; a request in OpenAI's form also has the answer in that form."""
        return {"custom_id": self.row.custom_id, **self._said(model), "input": self.asked}

    def _said(self, model: str) -> dict[str, Any]:
        end = self.end
        if not isinstance(end, Finished):
            return {"error": {"code": type(end).__name__.rstrip("_"), "message": str(end)}}
        timings = asdict(end.timings)
        for name in ("started", "load_seconds", "peak_memory_bytes"):  # not of the row
            del timings[name]
        found = {
            "text": end.text,
            "error": None,
            "finish_reason": end.reason,
            "model": model,
            "seed": end.seed,
            "usage": asdict(end.usage),
            "timings": {name: value and round(value, 6) for name, value in timings.items()},
        }
        return found | ({"response": self._response(end, model)} if self.is_openai else {})

    def _response(self, end: Finished, model: str) -> dict[str, Any]:
        prompt, completion = end.usage.prompt_tokens, end.usage.completion_tokens
        message = {"role": "assistant", "content": end.text, "refusal": None}
        reason = finish_reason(end.reason)
        body = {
            "id": f"chatcmpl-{self.asked}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
        }
        return {"status_code": 200, "request_id": self.asked, "body": body}


def answer_lines(
    model: LoadedModel, rows: Iterable[Row], defaults: Defaults, at_once: int | None
) -> Iterator[Line]:
    """The line of each row, in order of finishing. at_once: None for as usual."""
    engine = model.engine_of(at_once or usual_rows(model, model.memory))
    for one in answer_rows(engine, rows, partial(prepare, model, defaults)):
        yield one.record(model.spec.name)


def answer_rows(
    engine: Engine, rows: Iterable[Row], prepare: Callable[[Row], Outcome]
) -> Iterator[Outcome]:
    """Each row with its answer or error, in order of finishing.

    prepare: makes a row's request, in threads beside the model. A reader that stops cancels the
    rest. Raises what is no row's fault.
    """
    readers = min(MOST_READERS, os.cpu_count() or 1)
    worker.pool.allow(readers)
    coming = iter(rows)
    ahead = min(engine.rows, MOST_AHEAD) + readers
    pool = ThreadPoolExecutor(readers, "mmchat pictures")

    def ready() -> Iterator[Talk[Outcome] | None]:
        """Those whose pictures are read; None while the model has others to go on with."""
        reading: deque[Future[Outcome]] = deque()
        while True:
            while len(reading) < ahead and (row := next(coming, None)) is not None:
                reading.append(pool.submit(prepare, row))
            if not reading:
                return
            if not engine.has_work:
                wait(reading, return_when=FIRST_COMPLETED)
            done = next((future for future in reading if future.done()), None)
            if done is not None:
                reading.remove(done)
            yield done and _asked(done.result())

    try:
        yield from hold(engine, ready(), in_order=False)
    finally:
        pool.shutdown(cancel_futures=True)


def _asked(one: Outcome) -> Talk[Outcome]:
    if not isinstance(one.end, Request):
        return one
    try:
        return replace(one, end=(yield one.end))
    except MmchatError as error:
        return replace(one, end=error)


def prepare(model: LoadedModel, defaults: Defaults, row: Row) -> Outcome:
    """A row with its pictures opened and laid out, or with the error that this ends in."""
    timings, asked, is_openai = Timings(), "", False

    def make() -> Request:
        nonlocal asked, is_openai
        content = row.read()
        asked, is_openai = content.digest(), content.body is not None
        messages, sampling = _messages(model, content, defaults)
        is_base = model.spec.chat_format == "base" and len(messages) == 1
        lay_out = model.processor.raw if is_base else model.processor.chat
        prompt = lay_out(messages[0] if is_base else messages)
        timings.preprocessing_seconds = time.perf_counter() - timings.started
        return model.request(prompt, sampling, timings)

    end = request_or_error(make)
    return Outcome(row, asked, is_openai, end)


def request_or_error(make: Callable[[], Request]) -> Request | MmchatError:
    """The request of a row, or why there is none: no row ends the job of all."""
    try:
        with memory_errors():
            return make()
    except MmchatError as error:
        return error.with_traceback(None)  # which would hold the pictures
    except Exception as error:  # of one row in a million
        return MmchatError(f"this is a bug in mmchat; please report it: {error!r}")


def _messages(
    model: LoadedModel, asked: Asked, defaults: Defaults
) -> tuple[list[Message], SamplingParams]:
    if asked.body is None:
        system = asked.system or defaults.system
        question = user_message(model, asked.prompt or defaults.prompt, asked.images)
        before = [Message("system", system)] if system else []
        return [*before, question], defaults.sampling
    processor = model.processor
    given, sampling = foreign.as_request(asked.body, defaults.sampling)
    messages = foreign.as_messages(given, processor.alpha, processor.image_tag)
    for message in messages:
        check_message(model, message)
    if messages[-1].role != "user":
        raise UsageError(f"the last message must be of the role user, not {messages[-1].role}")
    return messages, sampling


def still_to_do(rows: Sequence[Row], done: Mapping[str, str]) -> list[Row]:
    """The rows that are not done, or ask something else now. done: `input` by `custom_id`."""
    known = [row for row in rows if done.get(row.custom_id)]
    with ThreadPoolExecutor(MOST_READERS) as pool:
        now = pool.map(lambda row: row.read().digest(), known)
        same = {r.custom_id for r, d in zip(known, now, strict=True) if d == done[r.custom_id]}
    return [row for row in rows if row.custom_id not in same]
