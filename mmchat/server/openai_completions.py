"""POST /v1/completions: texts that are continued as they are, without the format of a chat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits
from mmchat.engine.events import Finished, TokenLogprob
from mmchat.server.ask import Answering, Ask, AskedMessage, begin
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import LARGEST_INTEGER, NUMBER, Bool, Logprobs, Sampled, read
from mmchat.server.openai_chat import StreamOptions
from mmchat.server.openai_forms import (
    FINISH_REASONS,
    entries,
    finite,
    head,
    refuse_unsupported,
    timings,
    usage,
)
from mmchat.server.stream import DONE, Json, Stream, sse
from mmchat.tokenizers.base import StreamDecoder

DEFAULT_TOKENS = 16
Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> list[Prompt]:
    """A text, its ids, or a list of either."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("input should be a text, a list of texts, token ids, or lists of them")
    if len(value) > limits.REQUEST_PROMPTS:
        raise ValueError(f"there are more than {limits.REQUEST_PROMPTS} prompts")
    if not all(isinstance(one, str) or _are_ids(one) for one in value):
        raise ValueError("each prompt should be a text or a list of token ids")
    return [one if isinstance(one, str) else tuple(one) for one in value]


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(one) is int for one in value)


class CompletionRequest(Sampled):
    prompt: Annotated[Any, BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_INTEGER), NUMBER] | None = None
    logprobs: Logprobs | None = None
    echo: Bool | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def most_tokens(self) -> int:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return bool(self.echo) and self.logprobs is not None

    def ask(self, prompt: Prompt) -> Ask:
        settings = self.settings(
            max_new_tokens=max(self.most_tokens, 1),  # an answer of none is cut afterwards
            logprobs=None if self.logprobs is None else max(self.logprobs, 1),
        )
        raw = AskedMessage("user", (prompt,), "prompt") if isinstance(prompt, str) else prompt
        return Ask(raw, settings, score_from=1 if self.scores else None)


async def completions(call: Call) -> Response:
    refuse_unsupported(call.body)
    request = await call.digest(read, CompletionRequest, call.body)
    if request.most_tokens == 0 and not request.echo:
        raise ApiError("invalid_value", "max_tokens 0 needs echo: true beside it", "max_tokens")
    answer = head(call, "text_completion", "cmpl-")
    if request.stream:
        first = await begin(call, request.ask(request.prompt[0]))
        return Stream(_chunks(call, request, first, answer))
    ended = await _all(call, request)
    return await call.service.apart(_whole, call, request, ended, answer)


def _whole(
    call: Call, request: CompletionRequest, ended: Sequence[Finished], head: dict[str, Any]
) -> Response:
    """Takes seconds where there are many scores."""
    choices = [_choice(call, request, at, finished) for at, finished in enumerate(ended)]
    times = {"timings": timings(ended[0], None)} if len(ended) == 1 else {}
    return Json({**head, "choices": choices, "usage": usage(*ended), **times})


async def _all(call: Call, request: CompletionRequest) -> list[Finished]:
    """The ends of all, as many at once as there are rows: what one waits for its own is no queue.

    Raises the first ApiError.
    """
    room, scores = asyncio.Semaphore(call.service.rows), 0

    async def one(prompt: Prompt) -> Finished:
        nonlocal scores
        async with room:
            answering = await begin(call, request.ask(prompt))
            if request.scores:
                scores += len(answering.prompt_ids) * max(request.logprobs or 0, 1)
            if scores > limits.REQUEST_SCORES:
                most = f"{limits.REQUEST_SCORES:,}"
                text = f"more than {most} log-probabilities; send fewer prompts, or stream them"
                raise ApiError("invalid_value", text, "logprobs")
            return _cut(request, await answering.whole())

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt)) for prompt in request.prompt]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _cut(request: CompletionRequest, finished: Finished) -> Finished:
    """Without the answer, where none is wanted."""
    if request.most_tokens:
        return finished
    counts = replace(finished.usage, completion_tokens=0)
    return replace(finished, reason="length", text="", usage=counts, output_ids=(), logprobs=())


def _choice(
    call: Call, request: CompletionRequest, index: int, finished: Finished
) -> dict[str, Any]:
    tokens = _Tokens(call, request)
    prompt = tokens.prompt(finished.prompt_ids) if request.echo else ""
    logprobs = None
    if request.logprobs is not None:
        scored = [finished.prompt_ids[0], *finished.prompt_logprobs] if request.scores else []
        logprobs = _Tokens(call, request).form([*scored, *finished.logprobs])
    reason = FINISH_REASONS[finished.reason]
    text = prompt + finished.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _chunks(
    call: Call, request: CompletionRequest, first: Answering, head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """One prompt after the other."""
    wants_usage = bool(request.stream_options and request.stream_options.include_usage)
    common = head | ({"usage": None} if wants_usage else {})
    ended = []
    for index, prompt in enumerate(request.prompt):
        answering = first if index == 0 else await begin(call, request.ask(prompt))
        async for choice in _pieces(call, request, index, answering):
            yield sse({**common, "choices": [choice]})
        ended.append(_cut(request, answering.finished))
    if wants_usage:
        yield sse({**head, "choices": [], "usage": usage(*ended)})
    yield DONE


async def _pieces(
    call: Call, request: CompletionRequest, index: int, answering: Answering
) -> AsyncGenerator[dict[str, Any], None]:
    """Parts of one choice. One that is scored comes whole: its prompt is known at the end."""
    if request.scores or not request.most_tokens:
        finished = _cut(request, await answering.whole())
        yield await call.service.apart(_choice, call, request, index, finished)
        return

    def piece(text: str, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    tokens = _Tokens(call, request)
    if request.echo:
        yield piece(tokens.prompt(answering.prompt_ids))
    async for deltas in answering:
        text = "".join(delta.text for delta in deltas)
        found = entries(deltas)
        if text or found:
            yield piece(text, tokens.form(found) if found else None)
    yield piece("", None, FINISH_REASONS[answering.finished.reason])


class _Tokens:
    """Tokens as this route tells them: by their text, and where in the text they begin.

    The token that ends an answer is among them: who sums up log-probabilities counts it.
    """

    def __init__(self, call: Call, request: CompletionRequest) -> None:
        self._tokenizer = call.service.model.tokenizer
        self._top = request.logprobs or 0
        self._decoder = StreamDecoder(self._tokenizer)
        self._length = 0

    def prompt(self, ids: Sequence[int]) -> str:
        text = self._decoder.extend(ids) + self._decoder.flush()
        self._length = len(text)
        return text

    def form(self, found: Sequence[TokenLogprob | int]) -> dict[str, list[Any]]:
        """found: an id is a token that nothing comes before."""
        form: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for entry in found:
            is_scored = isinstance(entry, TokenLogprob)
            token_id = entry.token_id if is_scored else entry
            form["tokens"].append(self._name(token_id))
            form["token_logprobs"].append(finite(entry.logprob) if is_scored else None)
            top = entry.top[: self._top] if is_scored else None
            named = None if top is None else {self._name(i): finite(value) for i, value in top}
            form["top_logprobs"].append(named)
            form["text_offset"].append(self._length)
            self._length += len(self._decoder.push(token_id))
        return form

    def _name(self, token_id: int) -> str:
        """A part of a character has no text of its own."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
