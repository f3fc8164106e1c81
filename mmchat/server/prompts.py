"""What is asked, in the one form that all APIs become, and the prompt that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from mmchat import limits
from mmchat.conversation import IMAGE_MARK, Image, Message, Role, ToolCall, arranged
from mmchat.errors import ContextLengthExceeded
from mmchat.server.call import Call
from mmchat.server.errors import invalid
from mmchat.server.held import NO_TOOLS, Plan, Schema
from mmchat.server.pictures import Picture, open_pictures

if TYPE_CHECKING:
    from mmchat.models.prompt import Prompt

T = TypeVar("T")
Opened = Mapping[Picture, list[Image]]  # the pictures of each: a document has several
_ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class AskedMessage:
    """A message as it was sent. param: the field that it stands in, as `messages.2`.

    calls: of tools, by the assistant.
    """

    role: Role
    parts: tuple[str | Picture, ...]
    param: str
    calls: tuple[ToolCall, ...] = ()

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


def asked_message(
    speaker: str, parts: Iterable[str | Picture], param: str, calls: Iterable[ToolCall] = ()
) -> AskedMessage:
    """speaker: as a client calls it. Raises ApiError."""
    if (role := _ROLES.get(speaker)) is None:
        raise invalid(f"{param}.role", f"a role is one of {', '.join(_ROLES)}")
    asked = AskedMessage(role, tuple(parts), param, tuple(calls))
    if asked.calls and role != "assistant":
        text = f"only the assistant calls tools, not a message of {role}"
        raise invalid(f"{param}.tool_calls", text)
    return asked


@dataclass(frozen=True)
class Ask:
    """What is asked.

    ids: of a conversation that the messages go on with; without messages, of a text. is_raw: the
    one message is continued without the chat format, as such a text is. settings: fields of
    SamplingParams; the rest is as the model's makers recommend. context: positions of prompt and
    answer, if fewer than the server allows. score_from: as in engine.request. drops_oldest: the
    oldest messages may be left out to fit. schema: what the text must be. plan: the tools that may
    or must be called.
    """

    messages: tuple[AskedMessage, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    is_raw: bool = False
    context: int | None = None
    score_from: int | None = None
    drops_oldest: bool = False
    schema: Schema | None = None
    plan: Plan = NO_TOOLS

    @property
    def pictures(self) -> list[Picture]:
        return [picture for message in self.messages for picture in message.pictures]


def that_fits(ask: Ask, make: Callable[[Ask], T]) -> T:
    """`make` of all of it, or, if it may be cut, without as few of its oldest messages as need be.

    System messages and the last one stay. Raises ContextLengthExceeded if that is too long.
    """
    try:
        return make(ask)
    except ContextLengthExceeded:
        if not ask.drops_oldest:
            raise
    old = [one for one in ask.messages[:-1] if one.role != "system"]

    def without(count: int) -> T:
        """Each message has its own `param`, so that equal ones differ."""
        kept = tuple(one for one in ask.messages if one not in old[:count])
        return make(replace(ask, messages=kept))

    found: T | None = None
    low, high = 1, len(old)
    while low <= high:
        middle = (low + high) // 2
        try:
            found, high = without(middle), middle - 1
        except ContextLengthExceeded:
            low = middle + 1
    return without(len(old)) if found is None else found  # the first raises


def opened_of(call: Call, ask: Ask, is_wanted: Callable[[], bool]) -> Opened:
    """Its pictures, once it is checked. Runs in a thread of its own. Raises ApiError."""
    if ask.messages or not ask.ids:
        _check(ask.messages, text_only=call.service.model.options.text_only)
    options, alpha = call.service.options, call.service.model.processor.alpha
    opened = open_pictures(ask.pictures, options, alpha, call.owner, is_wanted)
    return dict(zip(ask.pictures, opened, strict=True))


def prompt_of(call: Call, ask: Ask, opened: Opened) -> Prompt:
    """Runs in a thread of its own. Raises ApiError, MmchatError."""
    from mmchat.models.prompt import Prompt

    model = call.service.model
    if not all(0 <= token_id < model.vocab_size for token_id in ask.ids):
        param = "context" if ask.messages else "prompt"
        raise invalid(param, f"{param} has token ids that the model has not, or of a picture")
    if ask.ids and not ask.messages:
        return Prompt(ask.ids)
    marks = (IMAGE_MARK, model.processor.image_tag)
    messages = [_message(one, opened, marks) for one in ask.messages]
    if ask.is_raw:
        return model.processor.raw(messages[0])
    prompt = model.processor.chat(messages, ask.plan.declared)
    if ask.ids and prompt.media:
        text = "context goes on by text alone; send messages with pictures"
        raise invalid("context", text)
    begins_again = prompt.token_ids[:1] == ask.ids[:1]
    return replace(prompt, token_ids=ask.ids + prompt.token_ids[begins_again:])


def _check(messages: Sequence[AskedMessage], *, text_only: bool) -> None:
    if not messages:
        raise invalid("messages", "messages is empty; send at least one")
    if len(messages) > limits.REQUEST_MESSAGES:
        raise invalid("messages", f"there are more than {limits.REQUEST_MESSAGES} messages")
    count = 0
    for message in messages:
        name, content = message.param, f"{message.param}.content"
        if len(message.parts) > limits.REQUEST_PARTS:
            raise invalid(content, f"{name} has more than {limits.REQUEST_PARTS} parts")
        if not message.parts and message.role not in ("assistant", "tool"):
            raise invalid(content, f"{name} is empty")
        for picture in message.pictures:
            count += 1
            if message.role != "user":
                what = f"a picture in a {message.role} message is not seen"
                raise invalid(picture.param, f"{what}; put it into a user message")
            if count > limits.REQUEST_PICTURES:
                text = f"there are more than {limits.REQUEST_PICTURES} pictures"
                raise invalid(picture.param, text)
            if text_only:
                text = "the model was loaded for text only; send no picture"
                raise invalid(picture.param, text)


def _message(asked: AskedMessage, opened: Opened, marks: Sequence[str]) -> Message:
    parts = [part if isinstance(part, str) else opened[part] for part in asked.parts]
    return Message(asked.role, arranged(parts, marks), asked.calls)
