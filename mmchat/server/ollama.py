"""POST /api/chat and /api/generate: Ollama's forms of questions, and of answers in lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits, strict_json
from mmchat.conversation import ToolCall
from mmchat.engine.events import TokenLogprob
from mmchat.server import fields
from mmchat.server.ask import Answering, begin
from mmchat.server.call import Call
from mmchat.server.errors import invalid
from mmchat.server.fields import (
    Bool,
    Calling,
    RepetitionPenalty,
    StopString,
    Strings,
    Tools,
    Whole,
    at_most,
)
from mmchat.server.held import Schema, plan_of
from mmchat.server.models import check_name, read, rfc3339
from mmchat.server.openai_forms import logprobs, refuse_unsupported
from mmchat.server.pictures import Picture
from mmchat.server.prompts import Ask, AskedMessage, asked_message
from mmchat.server.stream import LINES, Fields, Items, Json, Stream, notice_header
from mmchat.server.tool_calls import Content

# What Ollama does where a program says nothing: revived programs answer as they did.
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}


def _duration(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("input should be a duration such as 5m, or seconds")
    return value


class Options(fields.Sampled):
    """How to choose tokens. What is about llama.cpp alone (num_gpu, …) is ignored as unknown."""

    top_k: Whole | None = None
    seed: Whole | None = None
    stop: Annotated[list[StopString], at_most(16), fields.STRINGS] | None = None
    repetition_penalty: RepetitionPenalty | None = Field(default=None, alias="repeat_penalty")
    num_predict: Whole | None = None
    num_ctx: Annotated[int, Field(ge=1), fields.NUMBER] | None = None

    def sampling(self, most_tokens: int, **more: Any) -> dict[str, Any]:
        """Fields of SamplingParams. most_tokens: for an answer without a limit of its own."""
        if self.num_predict is not None:  # 0 and less: what the context leaves
            more["max_new_tokens"] = self.num_predict if self.num_predict > 0 else most_tokens
        if self.top_k is not None:
            more["top_k"] = max(self.top_k, 0)
        if self.seed is not None and self.seed < 0:
            more["seed"] = None
        return DEFAULTS | self.settings(**more)


class Asked(fields.Body):
    """Fields of both routes that answer."""

    model: str = ""
    stream: Bool = True
    format: str | dict[str, Any] = ""
    options: Options = Options()
    keep_alive: Annotated[Any, BeforeValidator(_duration)] = None
    think: Bool | str = False
    logprobs: Bool = False
    top_logprobs: fields.Logprobs = 0

    def completed(self, ask: Ask, most_tokens: int) -> Ask:
        """With what these fields say of it. most_tokens: without a limit. Raises ApiError."""
        most = fields.most_logprobs(self.logprobs, self.top_logprobs)
        settings = self.options.sampling(most_tokens, logprobs=most)
        return replace(ask, settings=settings, context=self.options.num_ctx, schema=self._schema())

    def _schema(self) -> Schema | None:
        if self.format == "":
            return None
        if isinstance(self.format, dict):
            return Schema("format", self.format, is_lenient=True)
        if self.format != "json":
            raise invalid("format", 'format is "json" or a JSON schema')
        return Schema("format", {"type": "object"})

    def check(self, call: Call) -> None:
        """Raises ApiError for another model, and for what no model here does."""
        check_name(call, self.model)
        if self.think and self.think != "none":
            raise invalid("think", f'"{self.model}" does not support thinking')

    def notices(self, call: Call) -> list[str]:
        """What is done otherwise than asked."""
        wanted, most = self.options.num_ctx or 0, call.service.model.max_seq_len
        text = f"num_ctx {wanted} is more than the {most} of this server"
        return [text] if wanted > most else []


# How a route says a piece of the answer: text, and calls of tools
Say = Callable[[str, Sequence[ToolCall]], Fields]


class ChatMessage(Calling):
    role: str
    content: str = ""
    images: Strings = []


class ChatRequest(Asked):
    messages: Annotated[list[ChatMessage], at_most(limits.REQUEST_MESSAGES)] = []
    tools: Tools = []
    truncate: Bool = True

    def ask(self, most_tokens: int) -> Ask:
        messages = (_message(one, f"messages.{at}") for at, one in enumerate(self.messages))
        said = tuple(one for one in messages if one.parts or one.role != "system")
        ask = Ask(said, drops_oldest=self.truncate, plan=plan_of(self.tools))
        return self.completed(ask, most_tokens)


class GenerateRequest(Asked):
    prompt: str = ""
    images: Strings = []
    system: str = ""
    raw: Bool = False
    context: Annotated[list[Whole], at_most(None)] = []

    def ask(self, most_tokens: int) -> Ask:
        system = (AskedMessage("system", (self.system,), "system"),) if self.system else ()
        message = AskedMessage("user", _parts(self.prompt, self.images, "images"), "prompt")
        ask = Ask((*system, message), ids=tuple(self.context), is_raw=self.raw)
        return self.completed(ask, most_tokens)


async def chat(call: Call) -> Response:
    asked = await read(ChatRequest, call)
    asked.check(call)
    if not asked.messages:
        return _loaded(asked, _said)
    answering = await begin(call, await call.digest(asked.ask, call.service.model.max_seq_len))
    asked.messages.clear()  # as large as the body was
    return await _answer(asked, answering, _said)


async def generate(call: Call) -> Response:
    asked = await read(GenerateRequest, call)
    asked.check(call)
    refuse_unsupported(call.body, {"suffix": ("",), "template": ("",)})
    if not asked.prompt and not asked.images:
        return _loaded(asked, _written)
    if asked.raw and (asked.system or asked.context):
        raise invalid("raw", "raw mode does not support system or context")
    answering = await begin(call, await call.digest(asked.ask, call.service.model.max_seq_len))
    asked.prompt, asked.images = "", []  # as large as the body was
    return await _answer(asked, answering, _written, context=not asked.raw)


def _message(message: ChatMessage, param: str) -> AskedMessage:
    parts = _parts(message.content, message.images, f"{param}.images")
    return asked_message(message.role.lower(), parts, param, message.calls)


def _parts(text: str, images: Sequence[str], param: str) -> tuple[str | Picture, ...]:
    """Pictures come before the text, as Ollama put them."""
    pictures = (Picture(image, f"{param}.{at}") for at, image in enumerate(images))
    return (*pictures, *((text,) if text else ()))


def _loaded(asked: Asked, say: Say) -> Response:
    """The answer to no question: the model is here, and stays."""
    unloads = str(asked.keep_alive).rstrip("smh") in ("0", "0.0")  # as its programs let it go
    end = {"done": True, "done_reason": "unload" if unloads else "load"}
    return Json(_line(asked, {**say("", ()), **end}))


def _said(text: str, calls: Sequence[ToolCall]) -> Fields:
    """A call whose arguments are no object is said as text."""
    listed = []
    for made in calls:
        try:
            arguments = strict_json.parse_object(made.arguments.encode())
        except ValueError:
            text += f'{{"name": "{made.name}", "parameters": {made.arguments}}}'
        else:
            listed.append({"function": {"name": made.name, "arguments": arguments}})
    message = {"role": "assistant", "content": text}
    return {"message": {**message, "tool_calls": listed} if listed else message}


def _written(text: str, calls: Sequence[ToolCall]) -> Fields:
    return {"response": text}


def _line(asked: Asked, said: Fields) -> Fields:
    return {"model": asked.model, "created_at": rfc3339(), **said}


async def _answer(
    asked: Asked, answering: Answering, say: Say, *, context: bool = False
) -> Response:
    """context: say the ids of the conversation at the end, which a client may send back."""
    headers = notice_header([*asked.notices(answering.call), *answering.notices])
    if asked.stream:
        return Stream(_lines(asked, answering, say, context=context), LINES, headers)
    finished, said = await answering.whole(), answering.stream
    more = _logprobs(asked, answering, finished.logprobs)
    end = _end(answering, context=context)
    return Json(_line(asked, {**say(said.text, said.calls), **more, **end}), headers=headers)


async def _lines(asked: Asked, answering: Answering, say: Say, *, context: bool) -> Items:
    count = 0
    async for pieces, listed in answering.pieces():
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls = answering.stream.calls[count:]  # those that are complete now
        count += len(calls)
        more = _logprobs(asked, answering, listed)
        if text or calls or more:
            yield _line(asked, {**say(text, calls), **more, "done": False})
    yield _line(asked, {**say("", ()), **_end(answering, context=context)})


def _logprobs(asked: Asked, answering: Answering, found: Iterable[TokenLogprob]) -> Fields:
    listed = logprobs(answering.call, found, asked.top_logprobs) if asked.logprobs else None
    return {"logprobs": listed} if listed else {}


def _end(answering: Answering, *, context: bool) -> Fields:
    """The end of the last line; times are nanoseconds."""
    finished = answering.finished
    counts, times = finished.usage, finished.timings
    is_cut = answering.finish_reason == "length"
    ids = [*finished.prompt_ids, *finished.output_ids]
    return {
        "done": True,
        "done_reason": "length" if is_cut else "stop",
        "total_duration": _ns(time.perf_counter() - times.started),
        "load_duration": _ns(answering.queue_seconds or 0.0),
        "prompt_eval_count": counts.prompt_tokens,
        "prompt_eval_duration": _ns(times.vision_seconds + times.prefill_seconds),
        "eval_count": counts.completion_tokens,
        "eval_duration": _ns(times.decode_seconds),
        **({"context": ids} if context else {}),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
