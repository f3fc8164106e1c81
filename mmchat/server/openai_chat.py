"""POST /v1/chat/completions: OpenAI's form of messages, and of answers, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits
from mmchat.conversation import ToolCall
from mmchat.engine.events import TokenLogprob
from mmchat.server.ask import Ask, AskedMessage, begin, calling, role
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import Body, Bool, Flag, Length, Logprobs, Sampled, Tools, read
from mmchat.server.held import Schema, notice_header, planned
from mmchat.server.openai_forms import (
    head,
    logprobs,
    refuse_unsupported,
    timings,
    usage,
)
from mmchat.server.pictures import Picture
from mmchat.server.stream import DONE, Json, Stream, sse
from mmchat.server.told import MadeCall, Told
from mmchat.server.tool_calls import CallArguments, CallBegin, Content, Piece
from mmchat.server.tools import MOST_TOOLS


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def parts_of(value: Any) -> Any:
    if value is None:
        return []
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ImageUrl(Body):
    url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class Part(Body):
    type: Literal["text", "input_text", "output_text", "image_url", "input_image"]
    text: str | None = None
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url)] | None = None


Parts = Annotated[
    list[Part], Field(fail_fast=True, max_length=limits.REQUEST_PARTS), BeforeValidator(parts_of)
]


class ChatMessage(Body):
    role: str
    content: Parts = Field(default_factory=list)


class Function(Body):
    name: str
    arguments: str | None = None


class EarlierCall(Body):
    function: Function


EarlierCalls = Annotated[list[EarlierCall], Field(fail_fast=True, max_length=MOST_TOOLS)]


class CallingMessage(ChatMessage):
    tool_calls: EarlierCalls | None = None


class StreamOptions(Body):
    include_usage: Bool | None = None


class JsonSchema(Body):
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    object_schema: dict[str, Any] | None = Field(None, alias="schema")  # of llama-server


class ChatRequest(Sampled):
    messages: Annotated[
        list[CallingMessage], Field(fail_fast=True, max_length=limits.REQUEST_MESSAGES)
    ]
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: Bool | None = None
    top_logprobs: Logprobs | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: Bool | None = None


async def chat_completions(call: Call) -> Response:
    refuse_unsupported(call.body)
    request = await call.digest(read, ChatRequest, call.body)
    answer = head(call, "chat.completion", "chatcmpl-")
    answering = await begin(call, await call.digest(_ask, request))
    request.messages.clear()  # as large as the body was
    told = Told(answering)
    if request.stream:
        response: Response = Stream(_chunks(call, request, told, answer))
    else:
        response = Json(await _whole(call, request, told, answer))
    response.headers.update(notice_header(answering.notices))
    return response


def _ask(request: ChatRequest) -> Ask:
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            "invalid_value", "top_logprobs needs logprobs: true beside it", "top_logprobs"
        )
    most = [n for n in (request.max_tokens, request.max_completion_tokens) if n is not None]
    settings = request.settings(
        max_new_tokens=min(most, default=None),
        logprobs=max(request.top_logprobs or 0, 1) if request.logprobs else None,
    )
    return Ask(
        tuple(_message(one, f"messages.{i}") for i, one in enumerate(request.messages)),
        settings,
        schema=_schema(request.response_format),
        plan=planned(request.tools, request.tool_choice, request.parallel_tool_calls),
    )


def _message(message: CallingMessage, param: str) -> AskedMessage:
    functions = [one.function for one in message.tool_calls or ()]
    calls = [ToolCall(function.name, function.arguments or "{}") for function in functions]
    return calling(asked_message(message, param), calls)


def asked_message(message: ChatMessage, param: str) -> AskedMessage:
    parts = (_part(one, f"{param}.content.{i}") for i, one in enumerate(message.content))
    return AskedMessage(role(message.role, param), tuple(parts), param)


def _part(part: Part, param: str) -> str | Picture:
    if part.type.endswith("text"):
        if part.text is None:
            raise ApiError("invalid_value", f"{param}.text is missing", f"{param}.text")
        return part.text
    if part.image_url is None:
        raise ApiError("invalid_value", f"{param}.image_url is missing", f"{param}.image_url")
    return Picture(part.image_url.url, f"{param}.image_url")


def _schema(form: ResponseFormat | None) -> Schema | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        if form.object_schema is not None:
            return Schema("response_format.schema", form.object_schema)
        return Schema("response_format", {"type": "object"})
    param = "response_format.json_schema.schema"
    if form.json_schema is None or form.json_schema.json_schema is None:
        raise ApiError("invalid_value", f"{param} is missing", param)
    return Schema(param, form.json_schema.json_schema, form.json_schema.strict is False)


async def _whole(
    call: Call, request: ChatRequest, told: Told, head: dict[str, Any]
) -> dict[str, Any]:
    said = await told.read()
    finished = told.answering.finished
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    if said.calls:
        message["content"] = said.text or None
        message["tool_calls"] = [_call(one) for one in said.calls]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(call, request, finished.logprobs),
        "finish_reason": told.finish_reason,
    }
    times = timings(finished, told.answering.queue_seconds)
    return {**head, "choices": [choice], "usage": usage(finished), "timings": times}


async def _chunks(
    call: Call, request: ChatRequest, told: Told, head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    wants_usage = bool(request.stream_options and request.stream_options.include_usage)
    head = {**head, "object": "chat.completion.chunk"} | ({"usage": None} if wants_usage else {})

    def chunk(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for pieces, listed in told:
        found = _logprobs(call, request, listed)
        if not pieces and found and found["content"]:
            pieces = [Content("")]
        for piece in pieces:
            yield chunk(_delta(piece), found)
            found = None if found is None else {**found, "content": []}  # told already
    finished = told.answering.finished
    yield chunk({}, None, told.finish_reason)
    if wants_usage:
        times = timings(finished, told.answering.queue_seconds)
        yield sse({**head, "choices": [], "usage": usage(finished), "timings": times})
    yield DONE


def _call(made: MadeCall) -> dict[str, Any]:
    function = {"name": made.name, "arguments": made.arguments}
    return {"id": made.id, "type": "function", "function": function}


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Content(text):
            return {"content": text}
        case CallBegin(index, id_, name):
            return {"tool_calls": [{"index": index, **_call(MadeCall(id_, name))}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _logprobs(
    call: Call, request: ChatRequest, found: Iterable[TokenLogprob]
) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    content = logprobs(call.service.model, found, request.top_logprobs or 0)
    return {"content": content, "refusal": None}
