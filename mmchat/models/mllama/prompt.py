"""Prompts of Llama 3.2 Vision as token ids, built part by part.

Scaffolding is made of ids, text is encoded without special tokens, each picture is one image id
where it stands. So text that looks like scaffolding stays text, and image ids and pictures always
match in number (format: llama_models, ChatFormat; no system block without a system message).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmchat.conversation import Image, Message, Part, Text, ToolCall
from mmchat.errors import PromptError
from mmchat.models.messages import check_messages
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
_HEADERS = {"tool": "ipython"}  # by role, where it is another word


def chat_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    image_token_id: int,
    *,
    add_generation_prompt: bool = True,
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
    builder = _Builder(tokenizer, image_token_id)
    builder.special("<|begin_of_text|>")
    for message in messages:
        builder.header(_HEADERS.get(message.role, message.role))
        builder.parts(message.content)
        if message.calls:
            builder.parts([Text("; ".join(map(_as_written, message.calls)))])
        builder.special("<|eot_id|>")
    if add_generation_prompt:
        builder.header("assistant")
    return builder.finish()


def raw_ids(message: Message, tokenizer: Tokenizer, image_token_id: int) -> PromptIds:
    """The prompt of a base model: the begin-of-text id, then the parts in order.

    Raises PromptError over the limits.
    """
    check_messages([message])
    builder = _Builder(tokenizer, image_token_id)
    builder.special("<|begin_of_text|>")
    builder.parts(message.content)
    return builder.finish()


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


@dataclass
class _Builder:
    tokenizer: Tokenizer
    image_token_id: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def special(self, name: str) -> None:
        self.ids.append(self.tokenizer.special_id(name))

    def header(self, role: str) -> None:
        self.special("<|start_header_id|>")
        self.ids += self.tokenizer.encode(role)
        self.special("<|end_header_id|>")
        self.ids += self.tokenizer.encode("\n\n")

    def parts(self, parts: Sequence[Part]) -> None:
        """Each part by itself: text does not merge across a picture or a neighbouring part."""
        for part in parts:
            if isinstance(part, Image):
                self.positions.append(len(self.ids))
                self.images.append(part)
                self.ids.append(self.image_token_id)
            else:
                self.ids += self.tokenizer.encode(part.text)

    def finish(self) -> PromptIds:
        if self.ids.count(self.image_token_id) != len(self.images):
            raise PromptError("the text encodes to an image token; this must not happen")
        return PromptIds(tuple(self.ids), tuple(self.positions), tuple(self.images))
