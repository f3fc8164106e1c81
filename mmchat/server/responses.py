"""POST /v1/responses: OpenAI's newer form of the same questions. Nothing is kept between them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any

from starlette.responses import Response

from mmchat import limits
from mmchat.conversation import ToolCall
from mmchat.engine.events import Finished
from mmchat.server import openai_forms as forms
from mmchat.server.ask import Answering, Ask, AskedMessage, begin
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, invalid
from mmchat.server.fields import Body, Length, Strings, at_most, most_logprobs, plain, read
from mmchat.server.openai_chat import ChatMessage, Parts
from mmchat.server.stream import EVENTS, Fields, Items, Json, Stream, notice_header
from mmchat.server.tool_calls import CallArguments, CallBegin, Content, Piece

# What would need a memory of earlier requests, or of prompts
_OF_A_STATE: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "background": (False,), "prompt": (),
}  # fmt: skip
_WITHOUT_WORDS = ("reasoning", "compaction")  # items that others' models left in a history
_SAID_AGAIN = {
    "instructions", "max_output_tokens", "parallel_tool_calls", "temperature", "tool_choice",
    "tools", "top_p",
}  # fmt: skip
Event = tuple[str, Fields]  # its name, and what it says
_LOGPROBS = "message.output_text.logprobs"


_ITEM = plain(lambda text: [{"role": "user", "content": text}], list)


class Item(ChatMessage):
    """A message, a call, or what came of one."""

    type: str | None = None
    role: str = ""
    name: str | None = None
    arguments: str | None = None
    output: Parts = []


class TextOptions(Body):
    format: forms.TextFormat = forms.TextFormat(type="text")


class ResponseRequest(forms.Chatted):
    flat_tools = True
    input: Annotated[list[Item], at_most(limits.REQUEST_MESSAGES, 1), _ITEM]
    instructions: str | None = None
    max_output_tokens: Length | None = None
    text: TextOptions = TextOptions()
    include: Strings = []

    def ask(self) -> Ask:
        """Raises ApiError."""
        most = most_logprobs(True, self.top_logprobs) if _LOGPROBS in self.include else None
        settings = self.settings(max_new_tokens=self.max_output_tokens, logprobs=most)
        schema = self.text.format.held("text.format")
        return Ask(tuple(_messages(self)), settings, schema=schema, plan=self.plan)


async def responses(call: Call) -> Response:
    forms.refuse_unsupported(call.body)
    forms.refuse_unsupported(call.body, _OF_A_STATE)
    request = await call.digest(read, ResponseRequest, call.body)
    head = _head(call, request)
    answering = await begin(call, await call.digest(request.ask))
    request.input.clear()  # as large as the body was
    events = _events(request, answering, head)
    headers = notice_header(answering.notices)
    if request.stream:
        return Stream(_numbered(events), EVENTS, headers)
    *_, (_, last) = [event async for event in events]
    return Json(last["response"], headers=headers)


def _messages(request: ResponseRequest) -> list[AskedMessage]:
    messages: list[AskedMessage] = []
    if request.instructions:
        messages.append(AskedMessage("system", (request.instructions,), "instructions"))
    for at, item in enumerate(request.input):
        param = f"input.{at}"
        if item.type in (None, "message"):
            messages.append(item.asked(param))
        elif item.type == "function_call":
            called = AskedMessage("assistant", (), param)
            if messages and messages[-1].role == "assistant":
                called = messages.pop()
            made = ToolCall(item.name or "", item.arguments or "{}")
            messages.append(replace(called, calls=(*called.calls, made)))
        elif item.type == "function_call_output":
            messages.append(ChatMessage(role="tool", content=item.output).asked(param))
        elif item.type not in _WITHOUT_WORDS:
            text = "such an item is not supported here"
            raise ApiError("unsupported_parameter", text, f"{param}.type")
    if not messages:
        raise invalid("input", "input holds no message; send at least one")
    return messages


def _head(call: Call, request: ResponseRequest) -> Fields:
    """What is known before the answer is begun. Raises ApiError."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": forms.served_name(call),
        "metadata": {},
        "previous_response_id": None,
        "store": False,
        "text": {"format": {"type": request.text.format.type}},
        "error": None,
        **request.model_dump(include=_SAID_AGAIN),
    }


class _Output:
    """The items of an answer, and the events that tell them as they grow."""

    def __init__(self) -> None:
        self.items: list[Fields] = []
        self._open: Fields = {}  # the last of them, while it grows

    def add(self, piece: Piece, listed: list[Fields]) -> Iterator[Event]:
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
    def _of_item(self) -> Fields:
        return {"output_index": len(self.items) - 1, "item_id": self._open["id"]}

    @property
    def _of_part(self) -> Fields:
        return {**self._of_item, "content_index": 0}


async def _events(
    request: ResponseRequest, answering: Answering, head: Fields
) -> AsyncGenerator[Event, None]:
    """What an event says may change once the next is asked for."""
    output = _Output()
    state = {"status": "in_progress", "incomplete_details": None, "usage": None, "output": []}
    yield "created", {"response": head | state}
    yield "in_progress", {"response": head | state}
    async for pieces, found in answering.pieces():
        listed = forms.logprobs(answering.call, found, request.top_logprobs)
        for piece in pieces or ([Content("")] if listed else []):
            for event in output.add(piece, listed):
                yield event
            listed = []
    cut = answering.finish_reason == "length"
    status = "incomplete" if cut else "completed"
    first = () if output.items else output.add(Content(""), [])
    for event in chain(first, output.end(status)):
        yield event
    state = {
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": _usage(answering.finished),
        "output": output.items,
    }
    yield status, {"response": head | state}


async def _numbered(events: AsyncIterator[Event]) -> Items:
    number = 0
    async for kind, fields in events:
        yield {"type": f"response.{kind}", "sequence_number": number, **fields}
        number += 1


def _usage(finished: Finished) -> Fields:
    """Under the names of this route."""
    counts = forms.usage(finished)
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
