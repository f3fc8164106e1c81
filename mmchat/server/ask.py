"""The one request that all APIs become, its way to the engine, and its answer as it is written."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mmchat import limits
from mmchat.conversation import IMAGE_MARK, Image, Message, Role, ToolCall, arranged
from mmchat.engine.events import Finished, TextDelta, TokenLogprob
from mmchat.engine.request import Request, request_within
from mmchat.errors import ContextLengthExceeded, MemoryError_
from mmchat.server import log
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, api_error, invalid, said
from mmchat.server.held import NO_TOOLS, Plan, Schema, grammar_of
from mmchat.server.pictures import Picture, open_pictures
from mmchat.server.tool_calls import Piece
from mmchat.words import TEXT_ALONE

if TYPE_CHECKING:
    from mmchat.engine.driver import EngineThread
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import Prompt

QUEUE_SECONDS = 60.0  # from the whole body of a request to its row at most, pictures included
HEAT_NUMBERS = 4_000_000  # of one answer; of the words behind them nothing is told
JOIN_SECONDS = 0.025  # tokens of one answer that come within it are sent together
T = TypeVar("T")
_LENGTHS = {  # the field for the longest answer, where it is not max_tokens
    **dict.fromkeys(("/api/chat", "/api/generate"), "num_predict"),
    **dict.fromkeys(("/v1/responses", "/responses"), "max_output_tokens"),
}
Opened = Mapping[Picture, list[Image]]  # the pictures of each: a document has several
_ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class AskedMessage:
    """A message as it was sent. param: the field that it stands in, as `messages.2`.

    calls: of tools, by the assistant.
    """

    role: Role
    parts: tuple[str | Picture, ...]
    param: str
    calls: tuple[ToolCall, ...] = ()

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


def asked_message(
    speaker: str, parts: Iterable[str | Picture], param: str, calls: Iterable[ToolCall] = ()
) -> AskedMessage:
    """speaker: as a client calls it. Raises ApiError."""
    if (role := _ROLES.get(speaker)) is None:
        raise invalid(f"{param}.role", f"a role is one of {', '.join(_ROLES)}")
    asked = AskedMessage(role, tuple(parts), param, tuple(calls))
    if asked.calls and role != "assistant":
        text = f"only the assistant calls tools, not a message of {role}"
        raise invalid(f"{param}.tool_calls", text)
    return asked


@dataclass(frozen=True)
class Ask:
    """What is asked.

    ids: of a conversation that the messages go on with; without messages, of a text. is_raw: the
    one message is continued without the chat format, as such a text is. settings: fields of
    SamplingParams; the rest is as the model's makers recommend. context: positions of prompt and
    answer, if fewer than the server allows. score_from: as in engine.request. drops_oldest: the
    oldest messages may be left out to fit. schema: what the text must be. plan: the tools that may
    or must be called. look: an answer, of which is asked where it looked, in place of a new one.
    """

    messages: tuple[AskedMessage, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    is_raw: bool = False
    context: int | None = None
    score_from: int | None = None
    drops_oldest: bool = False
    schema: Schema | None = None
    plan: Plan = NO_TOOLS
    look: str | None = None

    @property
    def pictures(self) -> list[Picture]:
        return [picture for message in self.messages for picture in message.pictures]


class Answering:
    """An answer while it is written: iterate over the text, and tokens, that came together.

    stream: what `pieces` told of it so far. queue_seconds: how long it waited for a row, None while
    it waits.
    """

    def __init__(self, call: Call, thread: EngineThread, request: Request, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        self._came = came = asyncio.Event()
        self.stream = plan.stream()
        self.call, self.request, self._thread = call, request, thread
        self._submitted = time.perf_counter()
        try:
            # not `self._came`: what holds itself stays, pictures and all, until Python looks for it
            self._answer = thread.submit(
                request, lambda: loop.call_soon_threadsafe(came.set), call.served.engine
            )
        except MemoryError_ as error:  # it would not fit even alone: no use to try again
            length = _LENGTHS.get(call.path, "max_tokens")
            text = said(error).replace("--max-new-tokens", length)
            raise ApiError("context_length_exceeded", text) from None
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
            events = self._answer.take()
            deltas = [event for event in events if isinstance(event, TextDelta)]
            if deltas:
                text = "".join(delta.text for delta in deltas)
                yield text, [delta.logprob for delta in deltas if delta.logprob is not None]
            self._check()
            if not self._answer.has_more:
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

    def beside(self, request: Request) -> Answering:
        """What is asked of the same engine, for the same call."""
        return Answering(self.call, self._thread, request, NO_TOOLS)

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
        if self.request.watch:
            return  # it answers nothing
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
    return await in_time(call, partial(_begun, call, ask))


async def in_time(call: Call, work: Callable[[Callable[[], bool]], Awaitable[T]]) -> T:
    """Do it, told whether it is still wanted. Raises ApiError if it takes too long."""
    is_wanted = True
    try:
        async with asyncio.timeout(QUEUE_SECONDS):
            return await work(lambda: is_wanted)
    except TimeoutError:
        raise ApiError("overloaded", retry_after=call.service.retry_after) from None
    finally:
        is_wanted = False


async def _begun(call: Call, ask: Ask, is_wanted: Callable[[], bool]) -> Answering:
    service = call.service
    _, model = service.thread, call.model  # both are there, or it is refused at once
    call.serve()
    sampling = replace(model.sampling_defaults, **ask.settings)
    context = min(ask.context or model.max_seq_len, model.max_seq_len)

    def work() -> Request:
        grammar = grammar_of(model, ask.schema, ask.plan, call.owner)
        opened = opened_of(call, ask, is_wanted)
        request = that_fits(ask, lambda ask: make(ask, opened))
        if service.options.log_content:
            ids = request.prompt.token_ids
            log.content("prompt", model.tokenizer.decode(ids, skip_special=False))
        return replace(request, grammar=grammar)

    def make(ask: Ask, opened: Opened) -> Request:
        prompt = prompt_of(call, ask, opened)
        seconds = time.perf_counter() - call.timings.started
        timings = replace(call.timings, preprocessing_seconds=seconds)
        if ask.look is not None:
            return look_at(call, prompt, ask.look)
        wider = "num_ctx" if context < model.max_seq_len else "--max-seq-len"
        made = request_within(context, prompt, sampling, timings, wider=wider)
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


def look_at(call: Call, prompt: Prompt, answer: str) -> Request:
    """To ask where `answer` to `prompt` looked. Runs in a thread of its own. Raises MmchatError."""
    from mmchat.explain.look import look_request

    model = call.model
    ids = model.tokenizer.encode(answer)
    sizes = [placed.media.facts.tokens for placed in prompt.media]
    if len(ids) > (most := max(1, HEAT_NUMBERS // max(1, sum(sizes)))):
        data = b"".join(map(model.tokenizer.token_bytes, ids[:most]))
        answer = data.decode(errors="ignore")
    return replace(look_request(model, prompt, answer), owner=call.owner)


def that_fits(ask: Ask, make: Callable[[Ask], T]) -> T:
    """`make` of all of it, or, if it may be cut, without as few of its oldest messages as need be.

    System messages and the last one stay. Raises ContextLengthExceeded if that is too long.
    """
    try:
        return make(ask)
    except ContextLengthExceeded:
        if not ask.drops_oldest:
            raise
    old = [one for one in ask.messages[:-1] if one.role != "system"]

    made: dict[int, T] = {}  # by how many are left out

    def without(count: int) -> T:
        """Each message has its own `param`, so that equal ones differ."""
        kept = tuple(one for one in ask.messages if one not in old[:count])
        return make(replace(ask, messages=kept))

    def fits(count: int) -> bool:
        with suppress(ContextLengthExceeded):
            made[count] = without(count)
        return count in made

    fewest = bisect_left(range(len(old)), True, lo=1, key=fits)
    return made[fewest] if fewest in made else without(fewest)


def opened_of(call: Call, ask: Ask, is_wanted: Callable[[], bool]) -> Opened:
    """Its pictures, once it is checked. Runs in a thread of its own. Raises ApiError."""
    if ask.messages or not ask.ids:
        _check(ask.messages, call.model)
    options, alpha = call.service.options, call.model.processor.alpha
    opened = open_pictures(ask.pictures, options, alpha, call.owner, is_wanted)
    return dict(zip(ask.pictures, opened, strict=True))


def prompt_of(call: Call, ask: Ask, opened: Opened) -> Prompt:
    """Runs in a thread of its own. Raises ApiError, MmchatError."""
    model = call.model
    if not all(0 <= token_id < model.vocab_size for token_id in ask.ids):
        param = "context" if ask.messages else "prompt"
        raise invalid(param, f"{param} has token ids that the model has not, or of a picture")
    if ask.ids and not ask.messages:
        return model.processor.of_ids(ask.ids)
    marks, messages = (IMAGE_MARK, model.processor.image_tag), []
    for one in ask.messages:
        parts = [part if isinstance(part, str) else opened[part] for part in one.parts]
        messages.append(Message(one.role, arranged(parts, marks), one.calls))
    if ask.is_raw:
        return model.processor.raw(messages[0])
    prompt = model.processor.chat(messages, ask.plan.declared)
    if ask.ids and prompt.media:
        text = "context goes on by text alone; send messages with pictures"
        raise invalid("context", text)
    if not ask.ids:
        return prompt
    begins_again = prompt.token_ids[:1] == ask.ids[:1]
    joined = model.processor.of_ids(ask.ids + prompt.token_ids[begins_again:])
    return replace(joined, lead=prompt.lead)


def _check(messages: Sequence[AskedMessage], model: LoadedModel) -> None:
    if not messages:
        raise invalid("messages", "messages is empty; send at least one")
    count = 0
    for message in messages:
        if not message.parts and message.role not in ("assistant", "tool"):
            raise invalid(f"{message.param}.content", f"{message.param} is empty")
        for picture in message.pictures:
            count += 1
            if message.role != "user":
                what = f"a picture in a {message.role} message is not seen"
                raise invalid(picture.param, f"{what}; put it into a user message")
            if count > limits.REQUEST_PICTURES:
                text = f"there are more than {limits.REQUEST_PICTURES} pictures"
                raise invalid(picture.param, text)
            if model.options.text_only:
                why = TEXT_ALONE if model.spec.text_only else "the model was loaded for text only"
                raise invalid(picture.param, f"{why}; send no picture")
