"""POST /v1/chat/completions: OpenAI's form of messages, and of answers, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import Response

from mmchat import limits
from mmchat.engine.events import TokenLogprob
from mmchat.server import openai_forms as forms
from mmchat.server.ask import Answering, Ask, AskedMessage, asked_message, begin
from mmchat.server.call import Call
from mmchat.server.errors import invalid
from mmchat.server.fields import Body, Bool, Calling, Length, at_most, most_logprobs, plain, read
from mmchat.server.heat import check_heat, heat_beside
from mmchat.server.held import Schema
from mmchat.server.pictures import Picture
from mmchat.server.stream import CHUNKS, Fields, Items, Json, Stream, notice_header
from mmchat.server.tool_calls import CallArguments, CallBegin, Content, MadeCall, Piece


class ImageUrl(Body):
    url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class Part(Body):
    type: Literal["text", "input_text", "output_text", "image_url", "input_image"]
    text: str | None = None
    image_url: Annotated[ImageUrl, plain(lambda url: {"url": url}, dict)] | None = None


_TEXT = plain(lambda text: [{"type": "text", "text": text}], list)
Parts = Annotated[list[Part], at_most(limits.REQUEST_PARTS), _TEXT]


class ChatMessage(Calling):
    role: str
    content: Parts = []

    def asked(self, param: str) -> AskedMessage:
        """param: the field of this. Raises ApiError."""
        parts = (_part(one, f"{param}.content.{at}") for at, one in enumerate(self.content))
        return asked_message(self.role, parts, param, self.calls)


class ResponseFormat(forms.TextFormat):
    """The schema is one level deeper, or, as llama-server has it, of a json_object."""

    inner: forms.JsonSchema | None = Field(default=None, alias="json_schema")

    def held(self, param: str) -> Schema | None:
        if self.type == "json_schema":
            return (self.inner or forms.JsonSchema()).held(f"{param}.json_schema")
        return super().held(param)


class Messages(Body):
    messages: Annotated[list[ChatMessage], at_most(limits.REQUEST_MESSAGES)]

    def asked(self) -> tuple[AskedMessage, ...]:
        """Raises ApiError."""
        return tuple(one.asked(f"messages.{at}") for at, one in enumerate(self.messages))


class ChatRequest(Messages, forms.Chatted):
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: Bool = False
    response_format: ResponseFormat = ResponseFormat(type="text")
    heat: Bool = False

    def ask(self) -> Ask:
        """Raises ApiError."""
        most = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        settings = self.settings(
            max_new_tokens=min(most, default=None),
            logprobs=most_logprobs(self.logprobs, self.top_logprobs),
        )
        schema = self.response_format.held("response_format")
        return Ask(self.asked(), settings, schema=schema, plan=self.plan)


async def chat_completions(call: Call) -> Response:
    forms.refuse_unsupported(call.body)
    request = await call.digest(read, ChatRequest, call.body)
    if request.heat:
        check_heat(call)
    answer = forms.head(call, "chat.completion", "chatcmpl-")
    answering = await begin(call, await call.digest(request.ask))
    request.messages.clear()  # as large as the body was
    headers = notice_header(answering.notices)
    if request.stream:
        return Stream(_chunks(request, answering, answer), CHUNKS, headers)
    return Json(await _whole(request, answering, answer), headers=headers)


def _part(part: Part, param: str) -> str | Picture:
    if part.type.endswith("text"):
        if part.text is None:
            raise invalid(f"{param}.text", f"{param}.text is missing")
        return part.text
    if part.image_url is None:
        raise invalid(f"{param}.image_url", f"{param}.image_url is missing")
    return Picture(part.image_url.url, f"{param}.image_url")


async def _whole(request: ChatRequest, answering: Answering, head: Fields) -> Fields:
    finished, said = await answering.whole(), answering.stream
    message: Fields = {"role": "assistant", "content": said.text, "refusal": None}
    if said.made:
        message["content"] = said.text or None
        message["tool_calls"] = [_call(one) for one in said.made]
    listed = _logprobs(request, answering, finished.logprobs)
    choice = forms.choice({"message": message}, listed, answering.finish_reason)
    return {**head, "choices": [choice], **_counts(answering), **await _heat(request, answering)}


async def _chunks(request: ChatRequest, answering: Answering, head: Fields) -> Items:
    head["object"] = "chat.completion.chunk"
    if request.stream_options.include_usage:
        head["usage"] = None

    def chunk(delta: Fields, logprobs: Any = None, reason: str | None = None) -> Fields:
        return {**head, "choices": [forms.choice({"delta": delta}, logprobs, reason)]}

    yield chunk({"role": "assistant", "content": ""})
    async for pieces, listed in answering.pieces():
        found = _logprobs(request, answering, listed)
        if not pieces and found and found["content"]:
            pieces = [Content("")]
        for piece in pieces:
            yield chunk(_delta(piece), found)
            found = None if found is None else {**found, "content": []}  # told already
    last = chunk({}, None, answering.finish_reason)
    if request.stream_options.include_usage:
        yield last
        last = {**head, "choices": [], **_counts(answering)}
    yield {**last, **await _heat(request, answering)}


async def _heat(request: ChatRequest, answering: Answering) -> Fields:
    """What is told beside the answer, which stands also where nothing can be told."""
    return {"heat": await heat_beside(answering)} if request.heat else {}


def _counts(answering: Answering) -> Fields:
    finished, queue_seconds = answering.finished, answering.queue_seconds
    return {"usage": forms.usage(finished), "timings": forms.timings(finished, queue_seconds)}


def _call(made: MadeCall) -> Fields:
    function = {"name": made.name, "arguments": made.arguments}
    return {"id": made.id, "type": "function", "function": function}


def _delta(piece: Piece) -> Fields:
    match piece:
        case Content(text):
            return {"content": text}
        case CallBegin(index, id_, name):
            return {"tool_calls": [{"index": index, **_call(MadeCall(id_, name))}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _logprobs(
    request: ChatRequest, answering: Answering, found: Iterable[TokenLogprob]
) -> Fields | None:
    if not request.logprobs:
        return None
    return {"content": forms.logprobs(answering.call, found, request.top_logprobs), "refusal": None}
