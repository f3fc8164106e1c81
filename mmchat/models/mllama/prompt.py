"""Prompts of Llama 3.2 Vision as token ids, built part by part.

Scaffolding is made of ids, text is encoded without special tokens, each picture is one image id
where it stands. So text that looks like scaffolding stays text, and image ids and pictures always
match in number (format: llama_models, ChatFormat; no system block without a system message).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmchat.conversation import Message, Text, ToolCall
from mmchat.errors import PromptError
from mmchat.models.messages import PromptPart, Token, check_messages, content_of, ids_of
from mmchat.models.prompt import PromptIds
from mmchat.tokenizers.base import Tokenizer

STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# To the letter as in the chat template of the checkpoints, where no space follows the full stop.
_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper"
    " arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and'
    " its value}.Do not use variables.\n\n"
)
_BEGIN = Token("<|begin_of_text|>")
_HEADERS = {"tool": "ipython"}  # by role, where it is another word


def chat_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    image_token_id: int,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> PromptIds:
    """A conversation in the instruct format, with the header of the answer at its end.

    tools: declared in the first message of the user, as models of this family were taught. Raises
    PromptError for no messages, pictures that the user did not send, tools without a question, and
    over the limits.
    """
    if messages and tools:
        messages = _with_tools(messages, tools)
    check_messages(messages)
    return _ids(_chat_parts(messages), tokenizer, image_token_id)


def raw_ids(message: Message, tokenizer: Tokenizer, image_token_id: int) -> PromptIds:
    """The prompt of a base model: the begin-of-text id, then the parts in order.

    Raises PromptError over the limits.
    """
    check_messages([message])
    return _ids((_BEGIN, *content_of(message)), tokenizer, image_token_id)


def _ids(parts: Iterable[PromptPart], tokenizer: Tokenizer, image_token_id: int) -> PromptIds:
    ids = ids_of(parts, tokenizer, [image_token_id])
    if ids.input_ids.count(image_token_id) != len(ids.images):
        raise PromptError("the text encodes to an image token; this must not happen")
    return ids


def _chat_parts(messages: Sequence[Message]) -> Iterator[PromptPart]:
    yield _BEGIN
    for message in messages:
        yield from _header(_HEADERS.get(message.role, message.role))
        yield from content_of(message)
        if message.calls:
            yield "; ".join(map(_as_written, message.calls))
        yield Token("<|eot_id|>")
    yield from _header("assistant")


def _header(role: str) -> Iterator[PromptPart]:
    yield from (Token("<|start_header_id|>"), role, Token("<|end_header_id|>"), "\n\n")


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer."""
    return frozenset(map(tokenizer.special_id, STOP_TOKENS))


def _with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> Sequence[Message]:
    """The same with the tools before the first text of the user, behind pictures before that."""
    at = next((at for at, message in enumerate(messages) if message.role == "user"), None)
    if at is None:
        raise PromptError("tools need a question: send a user message")
    declared = "".join(f"{json.dumps(tool, indent=4, ensure_ascii=False)}\n\n" for tool in tools)
    content = list(messages[at].content)
    texts = [(n, part.text) for n, part in enumerate(content) if isinstance(part, Text)]
    place, question = texts[0] if texts else (len(content), "")
    # One text, as in the template: tokens do not merge where parts meet.
    content[place : place + 1] = [Text(_TOOLS + declared + question.strip())]
    return [*messages[:at], replace(messages[at], content=tuple(content)), *messages[at + 1 :]]


def _as_written(call: ToolCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'{{"name": {name}, "parameters": {call.arguments}}}'
