"""POST /v1/responses: OpenAI's newer form of the same questions. Nothing is kept between them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits
from mmchat.conversation import ToolCall
from mmchat.engine.events import Finished, TokenLogprob
from mmchat.server.ask import Ask, AskedMessage, begin
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import Body, Bool, Length, Logprobs, Sampled, Strings, Tools, read
from mmchat.server.held import Schema, notice_header, planned
from mmchat.server.openai_chat import ChatMessage, Parts, asked_message
from mmchat.server.openai_forms import (
    logprobs,
    refuse_unsupported,
    served_name,
    usage,
)
from mmchat.server.stream import Json, Stream, sse
from mmchat.server.told import Told
from mmchat.server.tool_calls import CallArguments, CallBegin, Content, Piece

# What would need a memory of earlier requests, or of prompts
_OF_A_STATE: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "background": (False,), "prompt": (),
}  # fmt: skip
_WITHOUT_WORDS = ("reasoning", "compaction")  # items that others' models left in a history
Event = tuple[str, dict[str, Any]]  # its name, and what it says
_LOGPROBS = "message.output_text.logprobs"


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class Item(ChatMessage):
    """A message, a call, or what came of one."""

    type: str | None = None
    role: str = ""
    name: str | None = None
    arguments: str | None = None
    output: Parts = Field(default_factory=list)


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class ResponseRequest(Sampled):
    input: Annotated[
        list[Item],
        Field(fail_fast=True, min_length=1, max_length=limits.REQUEST_MESSAGES),
        BeforeValidator(_as_items),
    ]
    instructions: str | None = None
    max_output_tokens: Length | None = None
    text: TextOptions | None = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: Bool | None = None
    include: Strings | None = None
    top_logprobs: Logprobs | None = None
    stream: Bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())


async def responses(call: Call) -> Response:
    refuse_unsupported(call.body)
    refuse_unsupported(call.body, _OF_A_STATE)
    request = await call.digest(read, ResponseRequest, call.body)
    form = _Form(call, request)
    answering = await begin(call, await call.digest(_ask, request))
    request.input.clear()  # as large as the body was
    events = _events(form, Told(answering))
    if request.stream:
        response: Response = Stream(_encoded(events))
    else:
        *_, (_, last) = [event async for event in events]
        response = Json(last["response"])
    response.headers.update(notice_header(answering.notices))
    return response


def _ask(request: ResponseRequest) -> Ask:
    settings = request.settings(
        max_new_tokens=request.max_output_tokens,
        logprobs=max(request.top_logprobs or 0, 1) if request.wants_logprobs else None,
    )
    return Ask(
        tuple(_messages(request)),
        settings,
        schema=_schema(request.text.format if request.text else None),
        plan=planned(request.tools, request.tool_choice, request.parallel_tool_calls),
    )


def _messages(request: ResponseRequest) -> list[AskedMessage]:
    messages: list[AskedMessage] = []
    if request.instructions:
        messages.append(AskedMessage("system", (request.instructions,), "instructions"))
    for at, item in enumerate(request.input):
        param = f"input.{at}"
        if item.type in (None, "message"):
            messages.append(asked_message(item, param))
        elif item.type == "function_call":
            called = AskedMessage("assistant", (), param)
            if messages and messages[-1].role == "assistant":
                called = messages.pop()
            made = ToolCall(item.name or "", item.arguments or "{}")
            messages.append(replace(called, calls=(*called.calls, made)))
        elif item.type == "function_call_output":
            result = ChatMessage(role="tool", content=item.output)
            messages.append(asked_message(result, param))
        elif item.type not in _WITHOUT_WORDS:
            raise ApiError(
                "unsupported_parameter", "such an item is not supported here", f"{param}.type"
            )
    return messages


def _schema(form: TextFormat | None) -> Schema | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Schema("text.format", {"type": "object"})
    if form.json_schema is None:
        raise ApiError("invalid_value", "text.format.schema is missing", "text.format.schema")
    return Schema("text.format.schema", form.json_schema, form.strict is False)


class _Form:
    """The forms of one answer, which has its ids before it is begun."""

    def __init__(self, call: Call, request: ResponseRequest) -> None:
        self._call, self._request = call, request
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served_name(call, call.body.get("model")),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": request.text.format.type}}
            if request.text and request.text.format
            else {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": request.top_p,
            "error": None,
        }

    def begun(self) -> dict[str, Any]:
        state = {"status": "in_progress", "incomplete_details": None, "usage": None}
        return {**self._head, **state, "output": []}

    def response(self, finished: Finished, items: list[dict[str, Any]]) -> dict[str, Any]:
        cut = items[-1]["status"] == "incomplete"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": _usage(finished),
        }

    def logprobs(self, found: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        if not self._request.wants_logprobs:
            return []
        return logprobs(self._call.service.model, found, self._request.top_logprobs or 0)


class _Output:
    """The items of an answer, and the events that tell them as they grow."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] = {}  # the last of them, while it grows

    def add(self, piece: Piece, listed: list[dict[str, Any]]) -> Iterator[Event]:
        match piece:
            case Content(text):
                if self._open.get("type") != "message":
                    yield from self._begin("msg", "message", role="assistant", content=[])
                    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                    self._open["content"].append(part)
                    yield "content_part.added", {**self._of_part, "part": part}
                [part] = self._open["content"]
                part["text"] += text
                part["logprobs"] += listed
                if text or listed:
                    more = {"delta": text, "logprobs": listed}
                    yield "output_text.delta", {**self._of_part, **more}
            case CallBegin(_, id_, name):
                yield from self._begin("fc", "function_call", call_id=id_, name=name, arguments="")
            case CallArguments(_, text):
                self._open["arguments"] += text
                yield "function_call_arguments.delta", {**self._of_item, "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        """Nothing more of the last item comes."""
        item, self._open["status"] = self._open, status
        if item["type"] == "message":
            [part] = item["content"]
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            yield "output_text.done", {**self._of_part, **said}
            yield "content_part.done", {**self._of_part, "part": part}
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", {**self._of_item, **said}
        yield "output_item.done", {"output_index": len(self.items) - 1, "item": item}
        self._open = {}

    def _begin(self, prefix: str, kind: str, **fields: Any) -> Iterator[Event]:
        if self._open:
            yield from self.end("completed")
        id_ = f"{prefix}_{secrets.token_hex(12)}"
        self._open = {"id": id_, "type": kind, "status": "in_progress", **fields}
        self.items.append(self._open)
        yield "output_item.added", {"output_index": len(self.items) - 1, "item": self._open}

    @property
    def _of_item(self) -> dict[str, Any]:
        return {"output_index": len(self.items) - 1, "item_id": self._open["id"]}

    @property
    def _of_part(self) -> dict[str, Any]:
        return {**self._of_item, "content_index": 0}


async def _events(form: _Form, told: Told) -> AsyncGenerator[Event, None]:
    """What an event says may change once the next is asked for."""
    output = _Output()
    yield "created", {"response": form.begun()}
    yield "in_progress", {"response": form.begun()}
    async for pieces, entries in told:
        listed = form.logprobs(entries)
        for piece in pieces or ([Content("")] if listed else []):
            for event in output.add(piece, listed):
                yield event
            listed = []
    if not output.items:
        for event in output.add(Content(""), []):
            yield event
    cut = told.finish_reason == "length"
    for event in output.end("incomplete" if cut else "completed"):
        yield event
    whole = form.response(told.answering.finished, output.items)
    yield whole["status"], {"response": whole}


async def _encoded(events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    number = 0
    async for kind, fields in events:
        name = f"response.{kind}"
        yield sse({"type": name, "sequence_number": number, **fields}, name)
        number += 1


def _usage(finished: Finished) -> dict[str, Any]:
    """Under the names of this route."""
    counts = usage(finished)
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
