"""The one request that all APIs become, and the only place that lets it reach the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmchat import limits
from mmchat.conversation import IMAGE_MARK, Image, Message, Role, ToolCall, arranged
from mmchat.engine.events import Finished, TextDelta
from mmchat.engine.request import Request, request_within
from mmchat.errors import MemoryError_
from mmchat.server import log
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, api_error
from mmchat.server.held import Schema, grammar_of
from mmchat.server.pictures import Picture, open_pictures
from mmchat.server.shorter import that_fits
from mmchat.server.tools import NO_TOOLS, Plan

if TYPE_CHECKING:
    from mmchat.engine.driver import EngineThread
    from mmchat.models.prompt import Processor, Prompt

QUEUE_SECONDS = 60.0  # from the whole body of a request to its row at most, pictures included
JOIN_SECONDS = 0.025  # tokens of one answer that come within it are sent together
Opened = Mapping[Picture, list[Image]]  # the pictures of each: a document has several


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


@dataclass(frozen=True)
class Ask:
    """What is asked.

    prompt: messages; or one message or token ids, which are continued without the chat format.
    settings: fields of SamplingParams; the rest is as the model's makers recommend.
    context: positions of prompt and answer, if fewer than the server allows.
    before: ids of a conversation that the messages go on with. score_from: as in engine.request.
    drops_oldest: the oldest messages may be left out to fit.
    schema: what the text must be. plan: the tools that may or must be called.
    """

    prompt: tuple[AskedMessage, ...] | AskedMessage | tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    before: tuple[int, ...] = ()
    score_from: int | None = None
    drops_oldest: bool = False
    schema: Schema | None = None
    plan: Plan = NO_TOOLS

    @property
    def messages(self) -> list[AskedMessage] | None:
        """None: it is token ids."""
        asked = (self.prompt,) if isinstance(self.prompt, AskedMessage) else self.prompt
        messages = [one for one in asked if isinstance(one, AskedMessage)]
        return messages if len(messages) == len(asked) else None

    @property
    def has_pictures(self) -> bool:
        return any(message.pictures for message in self.messages or ())

    @property
    def ids(self) -> list[int]:
        """Of a prompt of ids."""
        asked = () if isinstance(self.prompt, AskedMessage) else self.prompt
        return [one for one in asked if isinstance(one, int)]


class Answering:
    """An answer while it is written: iterate over the tokens that came together.

    plan: the calls that are looked for in it. finished: the end, once the iteration is over.
    queue_seconds: how long it waited for a row.
    """

    def __init__(self, call: Call, thread: EngineThread, request: Request, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self.plan = plan
        self._call, self._thread = call, thread
        self._submitted = time.perf_counter()
        try:
            self._answer = thread.submit(request, lambda: loop.call_soon_threadsafe(self._came.set))
        except MemoryError_ as error:  # it would not fit even alone: no use to try again
            raise ApiError("context_length_exceeded", str(error)) from None
        except RuntimeError as error:
            raise api_error(error) from error
        self.queue_seconds: float | None = None  # None: it still waits
        self._finished: Finished | None = None
        self._refused: ApiError | None = None
        call.service.answers.add(self)
        call.opened.callback(call.service.answers.discard, self)
        call.opened.callback(self.close)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self._answer.request.prompt.token_ids

    @property
    def notices(self) -> tuple[str, ...]:
        """What of a schema is not enforced."""
        grammar = self._answer.request.grammar
        return grammar.notices if grammar else ()

    @property
    def finished(self) -> Finished:
        if self._finished is None:
            raise RuntimeError("the answer is not finished")
        return self._finished

    async def begun(self) -> None:
        """Wait for a row. Raises ApiError."""
        try:
            await self._came.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        self._check()
        self.queue_seconds = time.perf_counter() - self._submitted

    async def __aiter__(self) -> AsyncIterator[list[TextDelta]]:
        """Raises ApiError."""
        while True:
            await self._came.wait()
            self._came.clear()
            is_over = self._answer.is_over  # before the last are taken
            events = self._answer.take()
            deltas = [event for event in events if isinstance(event, TextDelta)]
            if deltas:
                yield deltas
            self._check()
            if is_over:
                self._end()
                return
            if deltas:
                await asyncio.sleep(JOIN_SECONDS)

    async def whole(self) -> Finished:
        """The end of the answer. Raises ApiError."""
        async for _ in self:
            pass
        return self.finished

    def _end(self) -> None:
        finished = self._finished = self._answer.finished
        if finished is not None:
            if self._call.service.options.log_content:
                log.content("answer", finished.text)
            self._call.count(finished.usage.completion_tokens)
            seconds = time.perf_counter() - finished.timings.started
            self._call.service.metrics.answered(finished, self.queue_seconds or 0.0, seconds)

    def refuse(self, error: ApiError) -> None:
        """Do not begin it, if it still waits."""
        if self.queue_seconds is None:
            self._refused = error
            self._came.set()

    def end(self) -> None:
        """No more of it is wanted; what came so far is the answer."""
        if not self._answer.is_over:
            self._thread.cancel(self._answer)

    def close(self) -> None:
        """Nobody reads any more: its row is free before the next step."""
        if not self._answer.is_over:
            self._thread.cancel(self._answer)

    def _check(self) -> None:
        if self._refused is not None:
            raise self._refused
        if self._answer.error is not None:
            raise api_error(self._answer.error) from self._answer.error


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
        opened = _opened(call, ask, is_wanted)
        return replace(that_fits(ask, lambda ask: make(ask, opened)), grammar=grammar)

    def make(ask: Ask, opened: Opened) -> Request:
        prompt = _prompt(call, ask, opened)
        if service.options.log_content:
            log.content("prompt", model.tokenizer.decode(prompt.token_ids, skip_special=False))
        seconds = time.perf_counter() - call.timings.started
        timings = replace(call.timings, preprocessing_seconds=seconds)
        made = request_within(context, prompt, sampling, timings)
        return replace(made, owner=call.owner, score_from=ask.score_from)

    try:
        apart = service.apart_with_pictures if ask.has_pictures else service.apart
        request = await apart(work)
    except Exception as error:
        raise api_error(error) from error
    call.waiting.enter_context(service.holding())(_bytes(request))
    # the server may be draining by now
    answering = Answering(call, service.thread, request, ask.plan)
    await answering.begun()
    call.waiting.close()
    call.body.clear()  # its pictures may have many MiB, and the answer may take long
    return answering


def _bytes(request: Request) -> int:
    """What its pictures take while it waits."""
    media = (placed.media for placed in request.prompt.media)
    return sum(tensor.nbytes for one in media for tensor in one.tensors)


def _opened(call: Call, ask: Ask, is_wanted: Callable[[], bool]) -> Opened:
    """Runs in a thread of its own. Raises ApiError."""
    messages = ask.messages
    if messages is None:
        return {}
    _check_messages(call, messages)
    pictures = [picture for message in messages for picture in message.pictures]
    options, alpha = call.service.options, call.service.model.processor.alpha
    opened = open_pictures(pictures, options, alpha, call.owner, is_wanted)
    return dict(zip(pictures, opened, strict=True))


def _prompt(call: Call, ask: Ask, opened: Opened) -> Prompt:
    """Runs in a thread of its own. Raises ApiError, MmchatError."""
    processor, messages = call.service.model.processor, ask.messages
    if messages is None:
        return processor.of_ids(_ids(call, ask.ids, "prompt"))
    marks = (IMAGE_MARK, processor.image_tag)
    made = [_message(one, opened, marks) for one in messages]
    if isinstance(ask.prompt, AskedMessage):
        return processor.raw(made[0])
    chat = processor.chat(made, ask.plan.declared)
    return _behind(_ids(call, ask.before, "context"), chat, processor)


def _ids(call: Call, ids: Sequence[int], param: str) -> tuple[int, ...]:
    if not all(0 <= token_id < call.service.model.vocab_size for token_id in ids):
        raise ApiError(
            "invalid_value", f"{param} has token ids that the model has not, or of a picture", param
        )
    return tuple(ids)


def _behind(before: tuple[int, ...], prompt: Prompt, processor: Processor) -> Prompt:
    """The prompt as more of what `before` has begun."""
    if not before:
        return prompt
    if prompt.media:
        raise ApiError(
            "invalid_value", "context goes on by text alone; send messages with pictures", "context"
        )
    new = prompt.token_ids
    begins_again = new[:1] == before[:1]
    joined = processor.of_ids(before + new[begins_again:])
    return replace(joined, lead=prompt.lead)


_ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool",
}  # fmt: skip


def role(name: str, param: str) -> Role:
    """What a client calls the speaker of a message. Raises ApiError."""
    if name not in _ROLES:
        known = ", ".join(_ROLES)
        raise ApiError("invalid_value", f"a role is one of {known}", f"{param}.role")
    return _ROLES[name]


def calling(message: AskedMessage, calls: Sequence[ToolCall]) -> AskedMessage:
    """The same with calls of tools. Raises ApiError."""
    if calls and message.role != "assistant":
        raise ApiError(
            "invalid_value",
            f"only the assistant calls tools, not a message of {message.role}",
            f"{message.param}.tool_calls",
        )
    return replace(message, calls=tuple(calls))


def _check_messages(call: Call, messages: Sequence[AskedMessage]) -> None:
    if not messages:
        raise ApiError("invalid_value", "messages is empty; send at least one", "messages")
    if len(messages) > limits.REQUEST_MESSAGES:
        raise ApiError(
            "invalid_value", f"there are more than {limits.REQUEST_MESSAGES} messages", "messages"
        )
    pictures = 0
    for message in messages:
        if len(message.parts) > limits.REQUEST_PARTS:
            raise ApiError(
                "invalid_value",
                f"{message.param} has more than {limits.REQUEST_PARTS} parts",
                f"{message.param}.content",
            )
        if not message.parts and message.role not in ("assistant", "tool"):
            raise ApiError("invalid_value", f"{message.param} is empty", f"{message.param}.content")
        for picture in message.pictures:
            pictures += 1
            _check_picture(call, message, picture, pictures)


def _check_picture(call: Call, message: AskedMessage, picture: Picture, count: int) -> None:
    if message.role != "user":
        raise ApiError(
            "invalid_value",
            f"a picture in a {message.role} message is not seen; put it into a user message",
            picture.param,
        )
    if count > limits.REQUEST_PICTURES:
        raise ApiError(
            "invalid_value",
            f"there are more than {limits.REQUEST_PICTURES} pictures",
            picture.param,
        )
    if call.service.model.options.text_only:
        raise ApiError(
            "invalid_value", "the model was loaded for text only; send no picture", picture.param
        )


def _message(asked: AskedMessage, opened: Opened, marks: Sequence[str]) -> Message:
    parts = [part if isinstance(part, str) else opened[part] for part in asked.parts]
    return Message(asked.role, arranged(parts, marks), asked.calls)
