"""Messages of text and pictures, and conversations of them.

All of it is immutable, so that a turn that fails has changed nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from mmchat.errors import PromptError, UsageError, check_type, quoted
from mmchat.words import plural

if TYPE_CHECKING:
    import PIL.Image

IMAGE_MARK = "<|image|>"

FinishReason = Literal["stop", "length", "stop_string", "interrupted"]
Role = Literal["system", "user", "assistant", "tool"]


def finish_reason(reason: FinishReason) -> Literal["stop", "length"]:
    """As OpenAI says it of a text; where it was interrupted, whoever wrote it ends."""
    return "stop" if reason in ("stop", "stop_string") else "length"


@dataclass(frozen=True)
class Text:
    """Plain text. Special-token strings inside it stay text. Raises UsageError if it is none."""

    text: str

    def __post_init__(self) -> None:
        check_type("the text of a message", self.text, str, "a string")


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded picture; `mmchat.images.load_image` makes them.

    pixels: RGB, orientation applied. source: what the user called it, for display only.
    content_hash: sha256 over mode, size and pixels. notices: one line each, what was done to it
    that the user should know ("first of 12 frames"). Raises UsageError for fields of other types.
    """

    pixels: PIL.Image.Image
    source: str
    content_hash: str
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        mode = getattr(self.pixels, "mode", None)  # Pillow is not imported here
        if mode != "RGB":
            found = f"of mode {quoted(mode)}" if mode else type(self.pixels).__name__
            raise UsageError(
                f"pixels must be an RGB picture of Pillow, not {found}; mmchat.load_image makes one"
            )
        check_type("source", self.source, str, "a string")
        check_type("content_hash", self.content_hash, str, "a string")
        check_type("notices", self.notices, tuple, "a tuple of strings")

    @property
    def height(self) -> int:
        return self.pixels.height

    @property
    def width(self) -> int:
        return self.pixels.width


Part = Text | Image


@dataclass(frozen=True)
class Box:
    """A place in a picture that an answer names, as `ref` if it says what that is.

    points: (x, y) as shares of width and height: two opposite corners, or all four.
    """

    ref: str | None
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class NameTags:
    """What encloses the name of a picture in a family's own prompts: `<img>dog.png</img>`.

    most_bytes: of a name.
    """

    begin: str
    end: str
    most_bytes: int

    def split(self, text: str) -> list[str]:
        """Text and names in turn; the first and the last are text.

        Raises PromptError for a tag without its end, and for an empty or longer name.
        """
        first, *rest = text.split(self.begin)
        pieces = [first]
        for part in rest:
            name, end, after = part.partition(self.end)
            if not end:
                raise PromptError(f"{self.begin} in the text has no {self.end}; add it")
            size = len(name.encode("utf-8", "replace"))
            if not 1 <= size <= self.most_bytes:
                raise PromptError(
                    f"the name in {self.begin}…{self.end} has {size:,} bytes; 1 to"
                    f" {self.most_bytes} are possible, so give the picture with --image-prompt"
                )
            pieces += [name, after]
        return pieces


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant asks for. arguments: JSON text, as it was written."""

    name: str
    arguments: str = "{}"

    def __post_init__(self) -> None:
        check_type("the name of a call", self.name, str, "a string")
        check_type("the arguments of a call", self.arguments, str, "JSON text")


@dataclass(frozen=True)
class Message:
    """One turn of one speaker; `content` keeps the order of text and pictures.

    A string as content is its text. calls: what the assistant asks for after its text; what came of
    a call is a message of the role "tool". Raises UsageError for another role or other parts.
    """

    role: Role
    content: tuple[Part, ...]
    calls: tuple[ToolCall, ...] = ()

    if TYPE_CHECKING:  # what is taken is more than what is kept

        def __init__(
            self,
            role: Role,
            content: str | Part | Sequence[Part],
            calls: Sequence[ToolCall] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            roles = ", ".join(get_args(Role))
            raise UsageError(f"a role is one of {roles}, not {quoted(self.role)}")
        parts = Text(self.content) if isinstance(self.content, str) else self.content
        if isinstance(parts, Text | Image):
            parts = (parts,)
        check_type("the content of a message", parts, (tuple, list), "a list of Text and Image")
        for part in parts:
            check_type("a part of a message", part, (Text, Image), "a Text or an Image")
        object.__setattr__(self, "content", tuple(parts))
        check_type("the calls of a message", self.calls, (tuple, list), "a list of ToolCall")
        for call in self.calls:
            check_type("a call of a message", call, ToolCall, "a ToolCall")
        if self.calls and self.role != "assistant":
            raise UsageError(f"only the assistant calls tools, not a message of {self.role}")
        object.__setattr__(self, "calls", tuple(self.calls))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.content if isinstance(part, Image))


@dataclass(frozen=True)
class Turn:
    """A question and what was answered; `reason` "interrupted" marks a partial answer."""

    question: Message
    answer: str
    reason: FinishReason = "stop"

    @property
    def messages(self) -> tuple[Message, Message]:
        return self.question, Message("assistant", (Text(self.answer),))


@dataclass(frozen=True)
class Conversation:
    """A system prompt and turns. Pictures are numbered from 1, in the order of the text."""

    system: str | None = None
    turns: tuple[Turn, ...] = ()

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Conversation:
        """From messages: an optional system message, then questions and answers in turn.

        Raises PromptError if they come in another order, UsageError if they are none.
        """
        check_type("messages", messages, (list, tuple), "a list of Message")
        for message in messages:
            check_type("an item of messages", message, Message, "a Message")
        system = messages[0].text if messages and messages[0].role == "system" else None
        rest = messages[1:] if system is not None else messages
        pairs = list(zip(rest[::2], rest[1::2], strict=False))
        if len(rest) % 2 or any((q.role, a.role) != ("user", "assistant") for q, a in pairs):
            raise PromptError("a conversation is user and assistant messages in turn")
        if any(answer.calls for _, answer in pairs):
            raise PromptError("a conversation holds no calls of tools; give their messages alone")
        return cls(system, tuple(Turn(q, a.text) for q, a in pairs))

    @property
    def messages(self) -> list[Message]:
        """All of it, as the prompt is built from it."""
        head = [Message("system", (Text(self.system),))] if self.system else []
        return head + [message for turn in self.turns for message in turn.messages]

    @property
    def images(self) -> list[Image]:
        return [image for turn in self.turns for image in turn.question.images]

    def plus(self, turn: Turn) -> Conversation:
        return replace(self, turns=(*self.turns, turn))

    def without_last(self) -> Conversation:
        return replace(self, turns=self.turns[:-1])

    def without_first(self, count: int) -> Conversation:
        return replace(self, turns=self.turns[count:])

    def with_image(self, number: int, image: Image | None) -> Conversation:
        """The same with picture `number` replaced, or taken out if `image` is None.

        Raises PromptError if there is no such picture.
        """
        if not 1 <= number <= len(self.images):
            raise PromptError(f"there is no picture {number}; there are {len(self.images)}")
        numbers = count(1)
        turns = []
        for turn in self.turns:
            parts = [
                image if isinstance(part, Image) and next(numbers) == number else part
                for part in turn.question.content
            ]
            kept = tuple(part for part in parts if part is not None)
            turns.append(replace(turn, question=Message("user", kept)))
        return replace(self, turns=tuple(turns))


def question(
    text: str,
    images: Sequence[Image],
    *,
    marks: bool = False,
    tag: str = "",
    names: NameTags | None = None,
    opened: Mapping[str, Image] = MappingProxyType({}),
) -> Message:
    """A user message with the pictures before the text, where text can see them.

    marks: each `<|image|>` in the text is the place of one picture instead; pictures beyond the
    marks go to the front. tag: what the model's own prompts hold in place of a picture; if the text
    has it, pictures stand there and nowhere else. names: what encloses the name of a picture, by
    which one of `images` (its source, or its number from 1) or of those that were `opened` stands
    there. Raises PromptError for more marks than pictures, unless there are as many tags as other
    pictures, and for a name of none.
    """
    if names and names.begin in text:
        return Message("user", _by_names(text, images, tag, names, opened))
    if tag and tag in text:
        _check_tags(text, images, tag)
        return Message("user", arranged([*([image] for image in images), text], [tag]))
    placed = text.count(IMAGE_MARK) if marks else 0
    if placed > len(images):
        raise PromptError(
            f"the text has {placed} {IMAGE_MARK} marks for {len(images)} pictures; "
            "attach a picture for each"
        )
    front = len(images) - placed
    marked = arranged([*([image] for image in images[front:]), text], [IMAGE_MARK])
    return Message("user", (*images[:front], *marked))


def called(images: Sequence[Image]) -> dict[str, Image]:
    """Pictures by what a text may call them: their numbers from 1, and their sources."""
    numbered = {str(number): image for number, image in enumerate(images, start=1)}
    return numbered | {image.source: image for image in images}


def _by_names(
    text: str, images: Sequence[Image], tag: str, names: NameTags, opened: Mapping[str, Image]
) -> tuple[Part, ...]:
    pieces = names.split(text)
    known = called(images) | dict(opened)
    for name in pieces[1::2]:
        if name not in known:
            raise PromptError(
                f"the text names the picture {quoted(name, 200)}, which is not given; give it with"
                " --image-prompt, or let a text that you type open pictures with --image-tags"
                " (in a chat \\set image_tags on, in Python image_tags=True)"
            )
    placed = [known[name] for name in pieces[1::2]]
    others = [image for image in images if image not in placed]
    room = len(names.begin + names.end)  # so that places stay
    plain = "".join(" " * (room + len(p)) if n % 2 else p for n, p in enumerate(pieces))
    if (tag and tag in plain) or others:
        _check_tags(plain, others, tag)
    coming, content = iter(others), list[Part]()
    for number, piece in enumerate(pieces):
        if number % 2:
            content.append(known[piece])
            continue
        first, *rest = piece.split(tag) if tag else [piece]
        content.append(Text(first))
        for part in rest:
            content += [next(coming), Text(part)]
    return tuple(content)


def edited(old: Message, text: str, *, tag: str = "", names: NameTags | None = None) -> Message:
    """The question `old` with other text; its pictures stay, in front or at the tags."""
    return question(text, old.images, tag=tag, names=names)


def arranged(parts: Sequence[str | Sequence[Image]], marks: Sequence[str]) -> tuple[Part, ...]:
    """The content of a message out of texts and pictures that a program sent in this order.

    A list is the pages of one picture. Where the texts hold as many of one of the `marks` as there
    are pictures, these are their places; any other number of marks is text. So a prompt written
    with marks is what was meant, and nobody can inject a picture by a text.
    """
    pictures = [part for part in parts if not isinstance(part, str)]
    texts = [part for part in parts if isinstance(part, str)]
    fits = (m for m in marks if m and pictures and sum(t.count(m) for t in texts) == len(pictures))
    mark = next(fits, None)
    content: list[Part] = []
    if mark is None:
        for part in parts:
            content += [Text(part)] if isinstance(part, str) else part
        return tuple(content)
    coming = iter(pictures)
    for text in texts:
        first, *others = text.split(mark)
        # Also if empty: a picture at a family's own tag is not one that was put in front.
        content += [Text(first)] if first or mark != IMAGE_MARK else []
        for piece in others:
            content += [*next(coming), *([Text(piece)] if piece else [])]
    return tuple(content)


def _check_tags(text: str, images: Sequence[Image], tag: str) -> None:
    tags = [found.start() + 1 for found in re.finditer(re.escape(tag), text)]
    if len(tags) != len(images):
        have = "are" if len(images) != 1 else "is"
        places = "character " + ", ".join(map(str, tags[:9])) + (", …" if len(tags) > 9 else "")
        raise PromptError(
            f"the text has {plural(len(tags), f'{tag} tag')}, and there {have}"
            f" {plural(len(images), 'picture')}; give one for each, or leave the tags out to put"
            " pictures first" + (f" (found at {places})" if tags else "")
        )
