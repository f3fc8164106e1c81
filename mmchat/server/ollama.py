"""POST /api/chat and /api/generate: Ollama's forms of questions, and of answers in lines."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits, strict_json
from mmchat.conversation import ToolCall
from mmchat.engine.events import TokenLogprob
from mmchat.server.ask import Answering, Ask, AskedMessage, begin, calling, role
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import Body, Bool, Strings, Tools, Whole, read
from mmchat.server.held import notice_header, planned
from mmchat.server.ollama_forms import (
    Asked,
    check_asked,
    check_body,
    loaded,
    notices,
    rfc3339,
    statistics,
)
from mmchat.server.openai_forms import logprobs
from mmchat.server.pictures import Picture
from mmchat.server.stream import NDJSON, Json, Stream, ndjson
from mmchat.server.told import Told
from mmchat.server.tool_calls import Content
from mmchat.server.tools import MOST_TOOLS

# How a route says a piece of the answer: text, and calls of tools
Say = Callable[[str, Sequence[ToolCall]], Mapping[str, Any]]


def _absent(empty: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: empty if value is None else value)


def _json_text(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class Function(Body):
    name: str
    arguments: Annotated[str, BeforeValidator(_json_text), _absent("{}")] = "{}"


class EarlierCall(Body):
    function: Function


EarlierCalls = Annotated[list[EarlierCall], Field(fail_fast=True, max_length=MOST_TOOLS)]


class ChatMessage(Body):
    role: str
    content: Annotated[str, _absent("")] = ""
    images: Strings | None = None
    tool_calls: EarlierCalls | None = None


class ChatRequest(Asked):
    messages: Annotated[
        list[ChatMessage],
        Field(fail_fast=True, max_length=limits.REQUEST_MESSAGES),
        _absent([]),
    ] = Field(default_factory=list)
    tools: Tools | None = None
    truncate: Bool | None = None


class GenerateRequest(Asked):
    prompt: Annotated[str, _absent("")] = ""
    images: Strings | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    raw: Bool | None = None
    context: Annotated[list[Whole], Field(fail_fast=True)] | None = None


async def chat(call: Call) -> Response:
    check_body(call)
    asked = await call.digest(read, ChatRequest, call.body)
    check_asked(call, asked)
    if not asked.messages:
        return Json(_line(asked, {"message": _said("", ())}, loaded(asked)))
    answering = await begin(call, await call.digest(_ask, call, asked))
    asked.messages.clear()  # as large as the body was
    return await _answer(call, asked, answering, lambda *said: {"message": _said(*said)})


def _ask(call: Call, asked: ChatRequest) -> Ask:
    messages = (_message(one, f"messages.{at}") for at, one in enumerate(asked.messages))
    return Ask(
        tuple(one for one in messages if one.parts or one.role != "system"),
        asked.settings(call),
        asked.num_ctx,
        drops_oldest=asked.truncate is not False,
        schema=asked.json_schema,
        plan=planned(asked.tools),
    )


async def generate(call: Call) -> Response:
    check_body(call)
    asked = await call.digest(read, GenerateRequest, call.body)
    check_asked(call, asked)
    for name in ("suffix", "template"):
        if getattr(asked, name):
            raise ApiError("unsupported_parameter", f"{name} is not supported here", name)
    if not asked.prompt and not asked.images:
        return Json(_line(asked, {"response": ""}, loaded(asked)))
    answering = await begin(call, await call.digest(_ask_one, call, asked))
    asked.prompt, asked.images = "", None  # as large as the body was
    return await _answer(
        call, asked, answering, lambda text, _: {"response": text}, context=not asked.raw
    )


def _ask_one(call: Call, asked: GenerateRequest) -> Ask:
    return Ask(
        _prompt(asked),
        asked.settings(call),
        asked.num_ctx,
        before=tuple(asked.context or ()),
        schema=asked.json_schema,
    )


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
    asked = AskedMessage(role(message.role.lower(), param), parts, param)
    functions = [one.function for one in message.tool_calls or ()]
    return calling(asked, [ToolCall(f.name, f.arguments or "{}") for f in functions])


def _parts(text: str, images: Sequence[str] | None, param: str) -> tuple[str | Picture, ...]:
    """Pictures come before the text, as Ollama put them."""
    pictures = (Picture(image, f"{param}.{at}") for at, image in enumerate(images or ()))
    return (*pictures, *((text,) if text else ()))


def _said(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
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
    return {**message, "tool_calls": listed} if listed else message


def _line(asked: Asked, *parts: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"model": asked.model, "created_at": rfc3339(datetime.now(UTC))}
    for part in parts:
        line |= part
    return line


async def _answer(
    call: Call, asked: Asked, answering: Answering, say: Say, *, context: bool = False
) -> Response:
    """context: say the ids of the conversation at the end, which a client may send back."""
    told = Told(answering)
    if asked.stream is False:
        said = await told.read()
        more = _logprobs(call, asked, answering.finished.logprobs)
        end = _end(told, context=context)
        response: Response = Json(_line(asked, say(said.text, told.stream.calls), more, end))
    else:
        response = Stream(_lines(call, asked, told, say, context=context), NDJSON)
    response.headers.update(notice_header([*notices(call, asked), *answering.notices]))
    return response


async def _lines(
    call: Call, asked: Asked, told: Told, say: Say, *, context: bool
) -> AsyncGenerator[bytes, None]:
    count = 0
    async for pieces, listed in told:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls = told.stream.calls[count:]  # those that are complete now
        count += len(calls)
        more = _logprobs(call, asked, listed)
        if text or calls or more:
            yield ndjson(_line(asked, say(text, calls), more, {"done": False}))
    yield ndjson(_line(asked, say("", ()), _end(told, context=context)))


def _logprobs(
    call: Call, asked: Asked, found: Iterable[TokenLogprob]
) -> dict[str, list[dict[str, Any]]]:
    if not asked.logprobs:
        return {}
    listed = logprobs(call.service.model, found, asked.top_logprobs or 0)
    return {"logprobs": listed} if listed else {}


def _end(told: Told, *, context: bool) -> dict[str, Any]:
    finished = told.answering.finished
    ids = [*finished.prompt_ids, *finished.output_ids]
    return statistics(told.answering, told.finish_reason) | ({"context": ids} if context else {})
