"""POST /v1/responses: OpenAI's newer form of the same questions. Nothing is kept between them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat.engine.events import Finished
from mmchat.server.ask import Answering, Ask, AskedMessage, begin
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.fields import Body, Bool, Length, Logprobs, Sampled, read
from mmchat.server.openai_chat import ChatMessage, asked_message
from mmchat.server.openai_forms import (
    FINISH_REASONS,
    entries,
    logprobs,
    refuse_unsupported,
    served_name,
    usage,
)
from mmchat.server.stream import Json, Stream, sse

# What would need a memory of earlier requests, or of prompts
_OF_A_STATE: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "background": (False,), "prompt": (),
}  # fmt: skip
_WITHOUT_WORDS = ("reasoning", "compaction")  # items that others' models left in a history
_LOGPROBS = "message.output_text.logprobs"


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class Item(ChatMessage):
    type: str | None = None
    role: str = ""


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Body):
    format: TextFormat | None = None


class ResponseRequest(Sampled):
    input: Annotated[list[Item], Field(min_length=1), BeforeValidator(_as_items)]
    instructions: str | None = None
    max_output_tokens: Length | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    include: list[str] | None = None
    top_logprobs: Logprobs | None = None
    stream: Bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())


async def responses(call: Call) -> Response:
    refuse_unsupported(call.body)
    refuse_unsupported(call.body, _OF_A_STATE)
    request = read(ResponseRequest, call.body)
    form = _Form(call, request)
    answering = await begin(call, _ask(request))
    if request.stream:
        return Stream(_events(form, answering))
    return Json(form.response(await answering.whole()))


def _ask(request: ResponseRequest) -> Ask:
    settings = request.settings(
        max_new_tokens=request.max_output_tokens,
        logprobs=max(request.top_logprobs or 0, 1) if request.wants_logprobs else None,
    )
    return Ask(
        tuple(_messages(request)),
        settings,
        schema=_schema(request.text.format if request.text else None),
        tools=("tools", request.tools) if request.tools else None,
    )


def _messages(request: ResponseRequest) -> list[AskedMessage]:
    messages = []
    if request.instructions:
        messages.append(AskedMessage("system", (request.instructions,), "instructions"))
    for at, item in enumerate(request.input):
        param = f"input.{at}"
        if item.type in (None, "message"):
            messages.append(asked_message(item, param))
        elif item.type not in _WITHOUT_WORDS:
            raise ApiError(
                "unsupported_parameter", "such an item is not supported here", f"{param}.type"
            )
    return messages


def _schema(form: TextFormat | None) -> tuple[str, Any] | None:
    """The field that asks for JSON, and the schema that it must have."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return "text.format", {"type": "object"}
    if form.json_schema is None:
        raise ApiError("invalid_value", "text.format.schema is missing", "text.format.schema")
    return "text.format.schema", form.json_schema


class _Form:
    """The forms of one answer, which has its ids before it is begun."""

    def __init__(self, call: Call, request: ResponseRequest) -> None:
        self._call, self._request = call, request
        self.item_id = f"msg_{secrets.token_hex(12)}"
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": served_name(call, call.body.get("model")),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": request.text.format.type}}
            if request.text and request.text.format
            else {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": request.tools or [],
            "top_p": request.top_p,
            "error": None,
        }

    def begun(self) -> dict[str, Any]:
        state = {"status": "in_progress", "incomplete_details": None, "usage": None}
        return {**self._head, **state, "output": []}

    def response(self, finished: Finished) -> dict[str, Any]:
        cut = FINISH_REASONS[finished.reason] == "length"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self.message(self.part(finished), cut=cut)],
            "usage": _usage(finished),
        }

    def message(self, *parts: dict[str, Any], cut: bool = False) -> dict[str, Any]:
        status = "incomplete" if cut else "completed" if parts else "in_progress"
        return {
            "id": self.item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": list(parts),
        }

    def part(self, finished: Finished | None = None) -> dict[str, Any]:
        text, found = (finished.text, finished.logprobs) if finished else ("", ())
        told = self.logprobs(found)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": told}

    def logprobs(self, found: Any) -> list[dict[str, Any]]:
        if not self._request.wants_logprobs:
            return []
        return logprobs(self._call.service.model, found, self._request.top_logprobs or 0)


async def _events(form: _Form, answering: Answering) -> AsyncGenerator[bytes, None]:
    number = 0

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        name = f"response.{kind}"
        data = sse({"type": name, "sequence_number": number, **fields}, name)
        number += 1
        return data

    item = {"output_index": 0}
    part = {**item, "item_id": form.item_id, "content_index": 0}
    yield event("created", response=form.begun())
    yield event("in_progress", response=form.begun())
    yield event("output_item.added", **item, item=form.message())
    yield event("content_part.added", **part, part=form.part())
    async for deltas in answering:
        text = "".join(delta.text for delta in deltas)
        told = form.logprobs(entries(deltas))
        if text or told:
            yield event("output_text.delta", **part, delta=text, logprobs=told)
    finished = answering.finished
    whole = form.response(finished)
    [message] = whole["output"]
    [said] = message["content"]
    yield event("output_text.done", **part, text=said["text"], logprobs=said["logprobs"])
    yield event("content_part.done", **part, part=said)
    yield event("output_item.done", **item, item=message)
    yield event(whole["status"], response=whole)


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
