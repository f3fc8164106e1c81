"""What no family takes, and conversations whose texts are encoded one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mmchat import limits
from mmchat.conversation import Image, Message, Text
from mmchat.errors import PromptError
from mmchat.models.prompt import PromptIds
from mmchat.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Token:
    """A special token by its name."""

    name: str


PromptPart = str | Image | Token


def content_of(message: Message) -> Iterator[PromptPart]:
    """Its texts and pictures as they come."""
    for part in message.content:
        yield part.text if isinstance(part, Text) else part


def ids_of(
    parts: Iterable[PromptPart], tokenizer: Tokenizer, picture: Sequence[int], before: int = 0
) -> PromptIds:
    """Encode each part by itself: text does not merge across a picture or a special token.

    picture: the ids that stand for one, `before` of them in front of its positions.
    """
    ids, starts, images = list[int](), list[int](), list[Image]()
    for part in parts:
        if isinstance(part, Token):
            ids.append(tokenizer.special_id(part.name))
        elif isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            starts.append(len(ids) + before)
            images.append(part)
            ids += picture
    return PromptIds(tuple(ids), tuple(starts), tuple(images))


def check_messages(messages: Sequence[Message]) -> None:
    """Raises PromptError for no messages, pictures that the user did not send, over the limits."""
    if not messages:
        raise PromptError("the conversation is empty; send a message")
    size = images = 0
    for message in messages:
        size += len(message.text.encode("utf-8", "replace"))
        size += sum(len(call.name) + len(call.arguments) for call in message.calls)
        images += len(message.images)
        if message.role != "user" and message.images:
            raise PromptError(
                f"a {message.role} message holds a picture; only user messages can, put it there"
            )
    if images > limits.IMAGES_PER_PROMPT:
        raise PromptError(
            f"the prompt has {images} pictures; at most {limits.IMAGES_PER_PROMPT} are possible"
        )
    if size > limits.PROMPT_BYTES:
        raise PromptError(
            f"the prompt has {size:,} bytes of text; at most {limits.PROMPT_BYTES:,} are possible"
        )


def check_plain(messages: Sequence[Message], family: str) -> None:
    """The same for a family without tools, whose system message can only be the first."""
    for place, message in enumerate(messages):
        if message.role == "tool" or message.calls:
            raise PromptError(
                f"{family} was not taught to call tools; leave calls and their results out"
            )
        if message.role == "system" and place:
            raise PromptError("a system message can only be the first; put it there")
    check_messages(messages)
