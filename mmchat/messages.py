"""Message and its Text and Image parts: the one vocabulary for conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mmchat.errors import UsageError, check_type, quoted

if TYPE_CHECKING:
    import PIL.Image

Role = Literal["system", "user", "assistant"]


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
    that the user should know ("first of 12 frames").
    """

    pixels: PIL.Image.Image
    source: str
    content_hash: str
    notices: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return self.pixels.height

    @property
    def width(self) -> int:
        return self.pixels.width


Part = Text | Image


@dataclass(frozen=True)
class Message:
    """One turn of one speaker; `content` keeps the order of text and pictures.

    A string as content is its text. Raises UsageError for another role or other parts.
    """

    role: Role
    content: tuple[Part, ...]

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

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.content if isinstance(part, Image))
