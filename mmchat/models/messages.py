"""What no family takes, and what those do not that were not taught to call tools."""

from __future__ import annotations

from collections.abc import Sequence

from mmchat import limits
from mmchat.conversation import Message
from mmchat.errors import PromptError


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
