"""POST /api/chat and /api/generate: Ollama's forms of questions, and of answers in lines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat.engine.events import TokenLogprob
from mmchat.server.ask import Answering, Ask, AskedMessage, begin, role
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import Body, Bool, Whole, read
from mmchat.server.ollama_forms import (
    Asked,
    check_asked,
    check_body,
    loaded,
    notices,
    rfc3339,
    statistics,
)
from mmchat.server.openai_forms import entries, logprobs
from mmchat.server.pictures import Picture
from mmchat.server.stream import NDJSON, Json, Stream, ndjson

# How a route says a piece of the answer
Say = Callable[[str], Mapping[str, Any]]


def _absent(empty: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: empty if value is None else value)


class ChatMessage(Body):
    role: str
    content: Annotated[str, _absent("")] = ""
    images: list[str] | None = None


class ChatRequest(Asked):
    messages: Annotated[list[ChatMessage], _absent([])] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    truncate: Bool | None = None


class GenerateRequest(Asked):
    prompt: Annotated[str, _absent("")] = ""
    images: list[str] | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    raw: Bool | None = None
    context: list[Whole] | None = None


async def chat(call: Call) -> Response:
    check_body(call)
    asked = read(ChatRequest, call.body)
    check_asked(call, asked)
    if not asked.messages:
        return Json(_line(asked, {"message": _said("")}, loaded(asked)))
    messages = (_message(one, f"messages.{at}") for at, one in enumerate(asked.messages))
    ask = Ask(
        tuple(one for one in messages if one.parts or one.role != "system"),
        asked.settings(call),
        asked.num_ctx,
        drops_oldest=asked.truncate is not False,
        schema=asked.json_schema,
        tools=("tools", asked.tools) if asked.tools else None,
    )
    return await _answer(call, asked, ask, lambda text: {"message": _said(text)})


async def generate(call: Call) -> Response:
    check_body(call)
    asked = read(GenerateRequest, call.body)
    check_asked(call, asked)
    for name in ("suffix", "template"):
        if getattr(asked, name):
            raise ApiError("unsupported_parameter", f"{name} is not supported here", name)
    if not asked.prompt and not asked.images:
        return Json(_line(asked, {"response": ""}, loaded(asked)))
    ask = Ask(
        _prompt(asked),
        asked.settings(call),
        asked.num_ctx,
        before=tuple(asked.context or ()),
        schema=asked.json_schema,
    )
    return await _answer(call, asked, ask, lambda text: {"response": text}, context=not asked.raw)


def _prompt(asked: GenerateRequest) -> tuple[AskedMessage, ...] | AskedMessage:
    message = AskedMessage("user", _parts(asked.prompt, asked.images, "images"), "prompt")
    if not asked.raw:
        system = (AskedMessage("system", (asked.system,), "system"),) if asked.system else ()
        return (*system, message)
    if asked.system or asked.context:
        raise ApiError("invalid_value", "raw mode does not support system or context", "raw")
    return message


def _message(message: ChatMessage, param: str) -> AskedMessage:
    parts = _parts(message.content, message.images, f"{param}.images")
    return AskedMessage(role(message.role.lower(), param), parts, param)


def _parts(text: str, images: Sequence[str] | None, param: str) -> tuple[str | Picture, ...]:
    """Pictures come before the text, as Ollama put them."""
    pictures = (Picture(image, f"{param}.{at}") for at, image in enumerate(images or ()))
    return (*pictures, *((text,) if text else ()))


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _line(asked: Asked, *parts: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"model": asked.model, "created_at": rfc3339(datetime.now(UTC))}
    for part in parts:
        line |= part
    return line


async def _answer(
    call: Call, asked: Asked, ask: Ask, say: Say, *, context: bool = False
) -> Response:
    """context: say the ids of the conversation at the end, which a client may send back."""
    answering = await begin(call, ask)
    if asked.stream is False:
        finished = await answering.whole()
        more = _logprobs(call, asked, finished.logprobs)
        end = _end(answering, context=context)
        response: Response = Json(_line(asked, say(finished.text), more, end))
    else:
        response = Stream(_lines(call, asked, answering, say, context=context), NDJSON)
    response.headers.update(notices(call, asked))
    return response


async def _lines(
    call: Call, asked: Asked, answering: Answering, say: Say, *, context: bool
) -> AsyncGenerator[bytes, None]:
    async for deltas in answering:
        text = "".join(delta.text for delta in deltas)
        more = _logprobs(call, asked, entries(deltas))
        if text or more:
            yield ndjson(_line(asked, say(text), more, {"done": False}))
    yield ndjson(_line(asked, say(""), _end(answering, context=context)))


def _logprobs(
    call: Call, asked: Asked, found: Iterable[TokenLogprob]
) -> dict[str, list[dict[str, Any]]]:
    if not asked.logprobs:
        return {}
    listed = logprobs(call.service.model, found, asked.top_logprobs or 0)
    return {"logprobs": listed} if listed else {}


def _end(answering: Answering, *, context: bool) -> dict[str, Any]:
    finished = answering.finished
    ids = [*finished.prompt_ids, *finished.output_ids]
    return statistics(answering) | ({"context": ids} if context else {})
