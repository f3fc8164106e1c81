"""Prompts of Qwen-VL as token ids: ChatML, with pictures between tags of their own.

Scaffolding is made of ids and text is encoded by itself, so that text that looks like scaffolding
stays text. Only the tags of things and boxes are ids in text too: they are how one asks for places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmchat.conversation import Message, Text
from mmchat.models.messages import PromptPart, Token, check_plain, content_of, ids_of
from mmchat.models.prompt import PromptIds
from mmchat.tokenizers.base import Tokenizer

SYSTEM = "You are a helpful assistant."
FAMILY = "Qwen-VL"


def chat_parts(messages: Sequence[Message]) -> Iterator[PromptPart]:
    """A conversation in ChatML, up to where the answer begins.

    Raises PromptError for no messages, a system message behind others, calls of tools, pictures
    that the user did not send, and over the limits.
    """
    check_plain(messages, FAMILY)
    if messages[0].role != "system":
        messages = [Message("system", SYSTEM), *messages]
    pictures = 0
    for message in messages:
        yield from _header(message.role)
        answer = message.role == "assistant"  # the original strips it before it is put back
        yield from [message.text.strip()] if answer else _content(message, pictures)
        yield from (Token("<|im_end|>"), "\n")
        pictures += len(message.images)
    yield from _header("assistant")


def raw_parts(message: Message) -> Iterator[PromptPart]:
    """A prompt without a conversation, as bases take it: pictures and text."""
    check_plain([message], FAMILY)
    yield from content_of(message)


def _header(role: str) -> Iterator[PromptPart]:
    yield from (Token("<|im_start|>"), role, "\n")


def _content(message: Message, before: int) -> Iterator[PromptPart]:
    """The parts in their order; pictures in front are numbered through the conversation.

    before: pictures in earlier messages. A line's end and the text behind it are encoded together.
    """
    text, is_front = "", True
    for number, part in enumerate(message.content, start=before + 1):
        if isinstance(part, Text):
            is_front, text = False, text + part.text
            continue
        if is_front:
            text += f"Picture {number}: "
        yield from (text, part)
        text = "\n" if is_front else ""
    yield text


def prompt_ids(parts: Iterator[PromptPart], tokenizer: Tokenizer, positions: int) -> PromptIds:
    """Encode the parts. positions: how many ids each picture takes between its tags."""
    begin, end, pad = map(tokenizer.special_id, ("<img>", "</img>", "<imgpad>"))
    return ids_of(parts, tokenizer, [begin, *[pad] * positions, end], before=1)
