"""Message and its Text and Image parts: the one vocabulary for conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import PIL.Image

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """Plain text. Special-token strings inside it stay text."""

    text: str


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
    """One turn of one speaker; `content` keeps the order of text and pictures."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.content if isinstance(part, Image))
