"""POST /v1/completions: texts that are continued as they are, without the format of a chat."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits
from mmchat.conversation import finish_reason
from mmchat.engine.events import Finished, TokenLogprob
from mmchat.server import openai_forms as forms
from mmchat.server.ask import Answering, Ask, AskedMessage, begin
from mmchat.server.call import Call
from mmchat.server.errors import invalid
from mmchat.server.fields import LARGEST_INTEGER, NUMBER, Bool, Logprobs, most_logprobs, read
from mmchat.server.stream import CHUNKS, Fields, Items, Json, Stream
from mmchat.tokenizers.base import StreamDecoder

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


class CompletionRequest(forms.Streamed):
    prompt: Annotated[Any, BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_INTEGER), NUMBER] = 16
    logprobs: Logprobs | None = None
    echo: Bool = False

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return self.echo and self.logprobs is not None

    def ask(self, prompt: Prompt) -> Ask:
        settings = self.settings(
            max_new_tokens=max(self.max_tokens, 1),  # an answer of none is cut afterwards
            logprobs=most_logprobs(self.logprobs is not None, self.logprobs),
        )
        score_from = 1 if self.scores else None
        if not isinstance(prompt, str):
            return Ask(settings=settings, ids=prompt, score_from=score_from)
        message = AskedMessage("user", (prompt,), "prompt")
        return Ask((message,), settings, is_raw=True, score_from=score_from)


async def completions(call: Call) -> Response:
    forms.refuse_unsupported(call.body)
    request = await call.digest(read, CompletionRequest, call.body)
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens", "max_tokens 0 needs echo: true beside it")
    answer = forms.head(call, "text_completion", "cmpl-")
    if request.stream:
        first = await begin(call, request.ask(request.prompt[0]))
        return Stream(_chunks(call, request, first, answer), CHUNKS)
    ended = await _all(call, request)

    def whole() -> Response:
        """Takes seconds where there are many scores."""
        choices = [_choice(call, request, at, finished) for at, finished in enumerate(ended)]
        times = {"timings": forms.timings(ended[0], None)} if len(ended) == 1 else {}
        return Json({**answer, "choices": choices, "usage": forms.usage(*ended), **times})

    return await call.service.apart(whole)


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
                ids = answering.request.prompt.token_ids
                scores += len(ids) * max(request.logprobs or 0, 1)
            if scores > limits.REQUEST_SCORES:
                most = f"{limits.REQUEST_SCORES:,}"
                text = f"more than {most} log-probabilities; send fewer prompts, or stream them"
                raise invalid("logprobs", text)
            return _cut(request, await answering.whole())

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt)) for prompt in request.prompt]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _cut(request: CompletionRequest, finished: Finished) -> Finished:
    """Without the answer, where none is wanted."""
    if request.max_tokens:
        return finished
    counts = replace(finished.usage, completion_tokens=0)
    return replace(finished, reason="length", text="", usage=counts, output_ids=(), logprobs=())


def _choice(call: Call, request: CompletionRequest, index: int, finished: Finished) -> Fields:
    tokens = _Tokens(call, request)
    prompt = tokens.prompt(finished.prompt_ids) if request.echo else ""
    logprobs = None
    if request.logprobs is not None:
        scored = [finished.prompt_ids[0], *finished.prompt_logprobs] if request.scores else []
        logprobs = _Tokens(call, request).form([*scored, *finished.logprobs])
    said = {"text": prompt + finished.text}
    return forms.choice(said, logprobs, finish_reason(finished.reason), index)


async def _chunks(call: Call, request: CompletionRequest, first: Answering, head: Fields) -> Items:
    """One prompt after the other."""
    if request.stream_options.include_usage:
        head["usage"] = None
    ended = []

    def chunk(choice: Fields) -> Fields:
        return {**head, "choices": [choice]}

    for at, prompt in enumerate(request.prompt):
        answering = first if at == 0 else await begin(call, request.ask(prompt))
        if request.scores or not request.max_tokens:  # whole: its prompt is known at the end
            ended.append(_cut(request, await answering.whole()))
            scored = partial(_choice, call, request, at, ended[-1])
            yield chunk(await call.service.apart(scored))
            continue
        tokens = _Tokens(call, request)
        if request.echo:
            said = {"text": tokens.prompt(answering.request.prompt.token_ids)}
            yield chunk(forms.choice(said, index=at))
        async for text, found in answering:
            if text or found:
                listed = tokens.form(found) if found else None
                yield chunk(forms.choice({"text": text}, listed, index=at))
        ended.append(answering.finished)
        yield chunk(forms.choice({"text": ""}, None, answering.finish_reason, at))
    if request.stream_options.include_usage:
        yield {**head, "choices": [], "usage": forms.usage(*ended)}


class _Tokens:
    """Tokens as this route tells them: by their text, and where in the text they begin.

    The token that ends an answer is among them: who sums up log-probabilities counts it.
    """

    def __init__(self, call: Call, request: CompletionRequest) -> None:
        self._tokenizer = call.model.tokenizer
        self._top = request.logprobs or 0
        self._decoder = StreamDecoder(self._tokenizer)
        self._length = 0

    def prompt(self, ids: Sequence[int]) -> str:
        text = self._decoder.extend(ids) + self._decoder.flush()
        self._length = len(text)
        return text

    def form(self, found: Sequence[TokenLogprob | int]) -> dict[str, list[Any]]:
        """found: an id is a token that nothing comes before."""
        rows = []
        for entry in found:
            if isinstance(entry, int):
                token_id, value, top = entry, None, None
            else:
                token_id, value = entry.token_id, forms.finite(entry.logprob)
                top = {self._name(i): forms.finite(one) for i, one in entry.top[: self._top]}
            rows.append((self._name(token_id), value, top, self._length))
            self._length += len(self._decoder.push(token_id))
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[at] for row in rows] for at, name in enumerate(names)}

    def _name(self, token_id: int) -> str:
        """A part of a character has no text of its own."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
