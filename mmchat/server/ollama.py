"""POST /api/chat and /api/generate: Ollama's forms of questions, and of answers in lines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.responses import Response

from mmchat import limits, strict_json
from mmchat.conversation import ToolCall
from mmchat.engine.events import TokenLogprob
from mmchat.server import fields
from mmchat.server.ask import Answering, Ask, AskedMessage, asked_message, begin
from mmchat.server.call import Call
from mmchat.server.errors import invalid
from mmchat.server.fields import NUMBER, Bool, Strings, Tools, Whole, at_most
from mmchat.server.held import Schema, plan_of
from mmchat.server.models import DEFAULTS, check_name, read, rfc3339
from mmchat.server.openai_forms import logprobs, refuse_unsupported
from mmchat.server.pictures import Picture
from mmchat.server.stream import LINES, Fields, Items, Json, Stream, notice_header
from mmchat.server.tool_calls import Content


def _duration(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("input should be a duration such as 5m, or seconds")
    return value


def _schema(text: str) -> dict[str, Any] | None:
    if text not in ("", "json"):
        raise ValueError('input should be "json" or a JSON schema')
    return {"type": "object"} if text else None


class Options(fields.Sampled):
    """How to choose tokens. What is about llama.cpp alone (num_gpu, …) is ignored as unknown."""

    top_k: Whole | None = None
    seed: Annotated[int, Field(le=limits.SAMPLING["seed"][1]), NUMBER] | None = None
    stop: Annotated[list[fields.StopString], at_most(16), fields.STRINGS] | None = None
    repetition_penalty: Annotated[
        fields.Real | None, fields.within("repetition_penalty"), Field(alias="repeat_penalty")
    ] = None
    num_predict: Whole | None = None
    num_ctx: Annotated[int, Field(ge=1), fields.NUMBER] | None = None

    def sampling(self, most_tokens: int, own: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Fields of SamplingParams. most_tokens: for an answer without a limit of its own.

        own: what the model's folder says, where it is Ollama's.
        """
        if self.num_predict is not None:  # 0 and less: what the context leaves
            more["max_new_tokens"] = self.num_predict if self.num_predict > 0 else most_tokens
        if self.top_k is not None:
            more["top_k"] = max(self.top_k, 0)
        if self.seed is not None and self.seed < 0:
            more["seed"] = None
        return {**DEFAULTS, **own, **self.settings(**more)}


class Asked(fields.Body):
    """Fields of both routes that answer."""

    model: str = ""
    stream: Bool = True
    format: Annotated[dict[str, Any] | None, fields.plain(_schema, dict)] = None
    options: Options = Options()
    keep_alive: Annotated[Any, BeforeValidator(_duration)] = None
    think: Bool | str = False
    logprobs: Bool = False
    top_logprobs: fields.Logprobs = 0

    def question(self) -> Ask | None:
        """What only this route says, None if nothing is asked. Raises ApiError."""
        raise NotImplementedError

    def said(self, text: str, calls: Sequence[ToolCall]) -> Fields:
        """A piece of an answer."""
        raise NotImplementedError

    def ask(self, most_tokens: int, own: Mapping[str, Any]) -> Ask | None:
        """most_tokens, own: as of Options.sampling. Raises ApiError."""
        if (asked := self.question()) is None:
            return None
        most = fields.most_logprobs(self.logprobs, self.top_logprobs)
        settings = self.options.sampling(most_tokens, own, logprobs=most)
        schema = None
        if self.format is not None:
            schema = Schema("format", self.format, is_lenient=True)
        return replace(asked, settings=settings, context=self.options.num_ctx, schema=schema)

    def notices(self, call: Call) -> list[str]:
        """What is done otherwise than asked."""
        wanted, most = self.options.num_ctx or 0, call.model.max_seq_len
        text = f"num_ctx {wanted} is more than the {most} of this server"
        return [text] if wanted > most else []

    def line(self, text: str, calls: Sequence[ToolCall] = (), **more: Any) -> Fields:
        return {"model": self.model, "created_at": rfc3339(), **self.said(text, calls), **more}

    def end(self, answering: Answering) -> Fields:
        """Of the last line; times are nanoseconds."""
        counts, times = answering.finished.usage, answering.finished.timings
        return {
            "done": True,
            "done_reason": "length" if answering.finish_reason == "length" else "stop",
            "total_duration": _ns(time.perf_counter() - times.started),
            "load_duration": _ns(answering.queue_seconds or 0.0),
            "prompt_eval_count": counts.prompt_tokens,
            "prompt_eval_duration": _ns(times.vision_seconds + times.prefill_seconds),
            "eval_count": counts.completion_tokens,
            "eval_duration": _ns(times.decode_seconds),
        }


class ChatMessage(fields.Calling):
    role: str
    content: str = ""
    images: Strings = []

    def asked(self, param: str) -> AskedMessage:
        """param: the field of this. Raises ApiError."""
        parts = _parts(self.content, self.images, f"{param}.images")
        return asked_message(self.role.lower(), parts, param, self.calls)


class ChatRequest(Asked):
    messages: Annotated[list[ChatMessage], at_most(limits.REQUEST_MESSAGES)] = []
    tools: Tools = []
    truncate: Bool = True

    def question(self) -> Ask | None:
        asked = [one.asked(f"messages.{at}") for at, one in enumerate(self.messages)]
        kept = tuple(one for one in asked if one.parts or one.role != "system")
        ask = Ask(kept, drops_oldest=self.truncate, plan=plan_of(self.tools))
        self.messages.clear()  # as large as the body was
        return ask if asked else None

    def said(self, text: str, calls: Sequence[ToolCall]) -> Fields:
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


class GenerateRequest(Asked):
    prompt: str = ""
    images: Strings = []
    system: str = ""
    raw: Bool = False
    context: Annotated[list[Whole], at_most(None)] = []

    def question(self) -> Ask | None:
        if self.raw and (self.system or self.context):
            raise invalid("raw", "raw mode does not support system or context")
        system = (AskedMessage("system", (self.system,), "system"),) if self.system else ()
        asked = AskedMessage("user", _parts(self.prompt, self.images, "images"), "prompt")
        self.prompt, self.images = "", []  # as large as the body was
        ask = Ask((*system, asked), ids=tuple(self.context), is_raw=self.raw)
        return ask if asked.parts else None

    def said(self, text: str, calls: Sequence[ToolCall]) -> Fields:
        return {"response": text}

    def end(self, answering: Answering) -> Fields:
        """With the conversation, which a client may send back."""
        end, finished = super().end(answering), answering.finished
        ids = [*finished.prompt_ids, *finished.output_ids]
        return end if self.raw else {**end, "context": ids}


async def chat(call: Call) -> Response:
    return await _answered(call, ChatRequest)


async def generate(call: Call) -> Response:
    refuse_unsupported(call.body, {"suffix": ("",), "template": ("",)})
    return await _answered(call, GenerateRequest)


async def _answered(call: Call, kind: type[Asked]) -> Response:
    asked = await read(kind, call)
    check_name(call, asked.model)
    if asked.think and asked.think != "none":
        raise invalid("think", f'"{asked.model}" does not support thinking')
    ask = await call.digest(asked.ask, call.model.max_seq_len, call.service.ollama_sampling)
    if ask is None:  # the model is here, and stays
        unloads = str(asked.keep_alive).rstrip("smh") in ("0", "0.0")  # as its programs let it go
        return Json(asked.line("", done=True, done_reason="unload" if unloads else "load"))
    answering = await begin(call, ask)
    del ask  # its pictures
    headers = notice_header([*asked.notices(call), *answering.notices])
    if asked.stream:
        return Stream(_lines(asked, answering), LINES, headers)
    finished, said = await answering.whole(), answering.stream
    more = {**_logprobs(answering, finished.logprobs, asked), **asked.end(answering)}
    return Json(asked.line(said.text + said.cut, said.calls, **more), headers=headers)


def _parts(text: str, images: Sequence[str], param: str) -> tuple[str | Picture, ...]:
    """Pictures come before the text, as Ollama put them."""
    pictures = (Picture(image, f"{param}.{at}") for at, image in enumerate(images))
    return (*pictures, *((text,) if text else ()))


async def _lines(asked: Asked, answering: Answering) -> Items:
    count = 0
    async for pieces, listed in answering.pieces():
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls = answering.stream.calls[count:]  # those that are complete now
        count += len(calls)
        more = _logprobs(answering, listed, asked)
        if text or calls or more:
            yield asked.line(text, calls, **more, done=False)
    calls, cut = answering.stream.calls[count:], answering.stream.cut
    if calls or cut:  # by the end of the answer
        yield asked.line(cut, calls, done=False)
    yield asked.line("", **asked.end(answering))


def _logprobs(answering: Answering, found: Iterable[TokenLogprob], asked: Asked) -> Fields:
    listed = logprobs(answering.call, found, asked.top_logprobs)
    return {"logprobs": listed} if listed else {}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
