"""The only place that lets a request reach the engine, and its answer while it is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mmchat.engine.events import Finished, TextDelta, TokenLogprob
from mmchat.engine.request import Request, request_within
from mmchat.errors import MemoryError_
from mmchat.server import log
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, api_error
from mmchat.server.held import Plan, grammar_of
from mmchat.server.prompts import Ask, Opened, opened_of, prompt_of, that_fits
from mmchat.server.tool_calls import Piece

if TYPE_CHECKING:
    from mmchat.engine.driver import EngineThread

QUEUE_SECONDS = 60.0  # from the whole body of a request to its row at most, pictures included
JOIN_SECONDS = 0.025  # tokens of one answer that come within it are sent together


class Answering:
    """An answer while it is written: iterate over the text, and tokens, that came together.

    stream: what `pieces` told of it so far. queue_seconds: how long it waited for a row, None while
    it waits.
    """

    def __init__(self, call: Call, thread: EngineThread, request: Request, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self.stream = plan.stream()
        self.call, self.request, self._thread = call, request, thread
        self._submitted = time.perf_counter()
        try:
            self._answer = thread.submit(request, lambda: loop.call_soon_threadsafe(self._came.set))
        except MemoryError_ as error:  # it would not fit even alone: no use to try again
            raise ApiError("context_length_exceeded", str(error)) from None
        except RuntimeError as error:
            raise api_error(error) from error
        self.queue_seconds: float | None = None
        self._refused: ApiError | None = None
        call.service.answers.add(self)
        call.opened.callback(call.service.answers.discard, self)
        call.opened.callback(self.end)

    @property
    def notices(self) -> tuple[str, ...]:
        """What of a schema is not enforced."""
        return self.request.grammar.notices if self.request.grammar else ()

    @property
    def finished(self) -> Finished:
        """The end, once the iteration is over."""
        if self._answer.finished is None:
            raise RuntimeError("the answer is not finished")
        return self._answer.finished

    async def begun(self) -> None:
        """Wait for a row. Raises ApiError."""
        try:
            await self._came.wait()
        except asyncio.CancelledError:
            self.end()
            raise
        self._check()
        self.queue_seconds = time.perf_counter() - self._submitted

    async def __aiter__(self) -> AsyncIterator[tuple[str, list[TokenLogprob]]]:
        """Raises ApiError."""
        while True:
            await self._came.wait()
            self._came.clear()
            is_over = self._answer.is_over  # before the last are taken
            events = self._answer.take()
            deltas = [event for event in events if isinstance(event, TextDelta)]
            if deltas:
                text = "".join(delta.text for delta in deltas)
                yield text, [delta.logprob for delta in deltas if delta.logprob is not None]
            self._check()
            if is_over:
                self._count()
                return
            if deltas:
                await asyncio.sleep(JOIN_SECONDS)

    async def pieces(self) -> AsyncIterator[tuple[list[Piece], list[TokenLogprob]]]:
        """Text and calls of tools as they come, until nothing more is wanted. Raises ApiError."""
        async for text, listed in self:
            if self.stream.is_done:
                continue
            pieces = self.stream.feed(text)
            if self.stream.is_done:
                self.end()
            yield pieces, listed
        if pieces := self.stream.end():
            yield pieces, []

    async def whole(self) -> Finished:
        """The end of the answer. Raises ApiError."""
        async for _ in self.pieces():
            pass
        return self.finished

    @property
    def finish_reason(self) -> str:
        """As OpenAI's chat says it."""
        return self.stream.finish_reason(self.finished.reason)

    def refuse(self, error: ApiError) -> None:
        """Do not begin it, if it still waits."""
        if self.queue_seconds is None:
            self._refused = error
            self._came.set()

    def end(self) -> None:
        """No more of it is wanted, or nobody reads: its row is free before the next step.

        What came so far is the answer.
        """
        if not self._answer.is_over:
            self._thread.cancel(self._answer)

    def _check(self) -> None:
        if self._refused is not None:
            raise self._refused
        if self._answer.error is not None:
            raise api_error(self._answer.error) from self._answer.error

    def _count(self) -> None:
        finished, service = self.finished, self.call.service
        if service.options.log_content:
            log.content("answer", finished.text)
        self.call.count(finished.usage.completion_tokens)
        seconds = time.perf_counter() - finished.timings.started
        service.metrics.answered(finished, self.queue_seconds or 0.0, seconds)


async def begin(call: Call, ask: Ask) -> Answering:
    """Check it, open its pictures, and wait for a row. The answer ends with the call.

    Raises ApiError, also if that takes longer than QUEUE_SECONDS.
    """
    is_wanted = True
    try:
        async with asyncio.timeout(QUEUE_SECONDS):
            return await _begun(call, ask, lambda: is_wanted)
    except TimeoutError:
        raise ApiError("overloaded", retry_after=call.service.retry_after) from None
    finally:
        is_wanted = False


async def _begun(call: Call, ask: Ask, is_wanted: Callable[[], bool]) -> Answering:
    service = call.service
    _, model = service.thread, service.model  # both are there, or it is refused at once
    call.serve()
    sampling = replace(model.sampling_defaults, **ask.settings)
    context = min(ask.context or model.max_seq_len, model.max_seq_len)

    def work() -> Request:
        grammar = grammar_of(model, ask.schema, ask.plan)
        opened = opened_of(call, ask, is_wanted)
        return replace(that_fits(ask, lambda ask: make(ask, opened)), grammar=grammar)

    def make(ask: Ask, opened: Opened) -> Request:
        prompt = prompt_of(call, ask, opened)
        if service.options.log_content:
            log.content("prompt", model.tokenizer.decode(prompt.token_ids, skip_special=False))
        seconds = time.perf_counter() - call.timings.started
        timings = replace(call.timings, preprocessing_seconds=seconds)
        made = request_within(context, prompt, sampling, timings)
        return replace(made, owner=call.owner, score_from=ask.score_from)

    try:
        request = await service.apart(work, pictures=bool(ask.pictures))
    except Exception as error:
        raise api_error(error) from error
    waits = (tensor for placed in request.prompt.media for tensor in placed.media.tensors)
    call.waiting.enter_context(service.holding())(sum(tensor.nbytes for tensor in waits))
    # the server may be draining by now
    answering = Answering(call, service.thread, request, ask.plan)
    await answering.begun()
    call.waiting.close()
    call.body.clear()  # its pictures may have many MiB, and the answer may take long
    return answering
