"""POST /api/chat and /api/generate: Ollama's forms of questions, and of answers in lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import strict_json
from mmchat.conversation import ToolCall
from mmchat.engine.events import TokenLogprob
from mmchat.server.ask import begin
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, invalid
from mmchat.server.fields import Bool, Calling, Whole
from mmchat.server.held import notice_header
from mmchat.server.ollama_forms import Asked, read, rfc3339
from mmchat.server.openai_forms import logprobs
from mmchat.server.pictures import Picture
from mmchat.server.prompts import Ask, AskedMessage, asked_message
from mmchat.server.stream import NDJSON, Chunks, Fields, Json, Stream, ndjson
from mmchat.server.told import Told
from mmchat.server.tool_calls import Content
from mmchat.server.tools import plan_of

# How a route says a piece of the answer: text, and calls of tools
Say = Callable[[str, Sequence[ToolCall]], Fields]


def _absent(empty: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: empty if value is None else value)


class ChatMessage(Calling):
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
    asked = read(ChatRequest, call)
    asked.check(call)

    def say(text: str, calls: Sequence[ToolCall]) -> Fields:
        return {"message": _said(text, calls)}

    if not asked.messages:
        return _loaded(asked, say)
    messages = (_message(one, f"messages.{at}") for at, one in enumerate(asked.messages))
    ask = Ask(
        tuple(one for one in messages if one.parts or one.role != "system"),
        asked.settings(call),
        context=asked.chosen.num_ctx,
        drops_oldest=asked.truncate is not False,
        schema=asked.json_schema,
        plan=plan_of(asked.tools),
    )
    return await _answer(call, asked, ask, say)


async def generate(call: Call) -> Response:
    asked = read(GenerateRequest, call)
    asked.check(call)
    for name in ("suffix", "template"):
        if getattr(asked, name):
            raise ApiError("unsupported_parameter", f"{name} is not supported here", name)

    def say(text: str, calls: Sequence[ToolCall]) -> Fields:
        return {"response": text}

    if not asked.prompt and not asked.images:
        return _loaded(asked, say)
    if asked.raw and (asked.system or asked.context):
        raise invalid("raw", "raw mode does not support system or context")
    system = (AskedMessage("system", (asked.system,), "system"),) if asked.system else ()
    message = AskedMessage("user", _parts(asked.prompt, asked.images, "images"), "prompt")
    ask = Ask(
        (*system, message),
        asked.settings(call),
        ids=tuple(asked.context or ()),
        is_raw=asked.raw is True,
        context=asked.chosen.num_ctx,
        schema=asked.json_schema,
    )
    return await _answer(call, asked, ask, say, context=not asked.raw)


def _message(message: ChatMessage, param: str) -> AskedMessage:
    parts = _parts(message.content, message.images, f"{param}.images")
    return asked_message(message.role.lower(), parts, param, message.calls)


def _parts(text: str, images: Sequence[str] | None, param: str) -> tuple[str | Picture, ...]:
    """Pictures come before the text, as Ollama put them."""
    pictures = (Picture(image, f"{param}.{at}") for at, image in enumerate(images or ()))
    return (*pictures, *((text,) if text else ()))


def _loaded(asked: Asked, say: Say) -> Response:
    """The answer to no question: the model is here, and stays."""
    unloads = str(asked.keep_alive).rstrip("smh") in ("0", "0.0")  # as its programs let it go
    end = {"done": True, "done_reason": "unload" if unloads else "load"}
    return Json(_line(asked, say("", ()), end))


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
    return {**message, "tool_calls": listed} if listed else message


def _line(asked: Asked, *parts: Mapping[str, Any]) -> Fields:
    line = {"model": asked.model, "created_at": rfc3339()}
    for part in parts:
        line |= part
    return line


async def _answer(
    call: Call, asked: Asked, ask: Ask, say: Say, *, context: bool = False
) -> Response:
    """context: say the ids of the conversation at the end, which a client may send back."""
    told = Told(await begin(call, ask))
    if asked.stream is False:
        said = await told.read()
        more = _logprobs(call, asked, told.answering.finished.logprobs)
        end = _end(told, context=context)
        response: Response = Json(_line(asked, say(said.text, said.calls), more, end))
    else:
        response = Stream(_lines(call, asked, told, say, context=context), NDJSON)
    response.headers.update(notice_header([*asked.notices(call), *told.answering.notices]))
    return response


async def _lines(call: Call, asked: Asked, told: Told, say: Say, *, context: bool) -> Chunks:
    count = 0
    async for pieces, listed in told:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls = told.stream.calls[count:]  # those that are complete now
        count += len(calls)
        more = _logprobs(call, asked, listed)
        if text or calls or more:
            yield ndjson(_line(asked, say(text, calls), more, {"done": False}))
    yield ndjson(_line(asked, say("", ()), _end(told, context=context)))


def _logprobs(call: Call, asked: Asked, found: Iterable[TokenLogprob]) -> Fields:
    listed = logprobs(call, found, asked.top_logprobs) if asked.logprobs else None
    return {"logprobs": listed} if listed else {}


def _end(told: Told, *, context: bool) -> Fields:
    """The end of the last line; times are nanoseconds."""
    finished = told.answering.finished
    counts, times = finished.usage, finished.timings
    is_cut = told.finish_reason == "length"
    ids = [*finished.prompt_ids, *finished.output_ids]
    return {
        "done": True,
        "done_reason": "length" if is_cut else "stop",
        "total_duration": _ns(time.perf_counter() - times.started),
        "load_duration": _ns(told.answering.queue_seconds or 0.0),
        "prompt_eval_count": counts.prompt_tokens,
        "prompt_eval_duration": _ns(times.vision_seconds + times.prefill_seconds),
        "eval_count": counts.completion_tokens,
        "eval_duration": _ns(times.decode_seconds),
        **({"context": ids} if context else {}),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
