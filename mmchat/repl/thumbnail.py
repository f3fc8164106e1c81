"""Small pictures in the terminal: kitty and Sixel by textual-image, half blocks by ourselves."""

from __future__ import annotations

import io
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

from mmchat.errors import MissingExtra
from mmchat.repl.render import MakeConsole

if TYPE_CHECKING:
    import PIL.Image

ThumbnailMode = Literal["auto", "off", "kitty", "sixel", "blocks"]
COLUMNS, ROWS = 32, 10
_UPPER_HALF = "▀"


def choose(mode: ThumbnailMode) -> str:
    """The way to draw: "off", "kitty", "sixel" or "blocks"; `auto` asks the terminal.

    Asking reads from the terminal, so it happens before the first prompt. Raises MissingExtra.
    """
    if mode in ("off", "blocks"):
        return mode
    logging.getLogger("textual_image").addHandler(logging.NullHandler())
    try:
        from textual_image import renderable
    except ImportError:
        if mode == "auto":
            return "blocks" if _has_colors() else "off"
        raise MissingExtra(
            f"--thumbnails {mode} needs an extra; run: pip install 'mmchat[thumbnails]'"
        ) from None
    except Exception:  # a terminal that answers with nonsense
        return "blocks" if mode == "auto" else mode
    if mode != "auto":
        return mode
    if renderable.Image is renderable.TGPImage:
        return "kitty"
    if renderable.Image is renderable.SixelImage:
        return "sixel"
    return "blocks" if _has_colors() else "off"


def _has_colors() -> bool:
    return os.environ.get("TERM", "dumb") not in ("dumb", "vt100") and not os.environ.get(
        "NO_COLOR"
    )


def draw(picture: PIL.Image.Image, way: str, make_console: MakeConsole, columns: int) -> str:
    """The characters that show `picture`, ending with a newline; empty for "off"."""
    if way == "off":
        return ""
    buffer = io.StringIO()
    console = make_console(buffer, columns)
    width, height = _cells(picture.size, min(COLUMNS, columns - 1))
    if way == "blocks":
        console.print(_blocks(picture, width, height), end="")
        return buffer.getvalue()
    from textual_image import renderable

    kind: Any = renderable.TGPImage if way == "kitty" else renderable.SixelImage
    console.print(kind(picture, width=width, height=height))
    return buffer.getvalue()


def _cells(size: tuple[int, int], columns: int) -> tuple[int, int]:
    """Columns and rows that keep the proportions; a cell is twice as high as wide."""
    width, height = size
    scale = min(columns / width, 2 * ROWS / height)
    return max(1, round(width * scale)), max(1, round(height * scale / 2))


def _blocks(picture: PIL.Image.Image, columns: int, rows: int) -> Any:
    """Two pixels in each cell, one as its upper half and one as its background."""
    from rich.color import Color
    from rich.segment import Segment, Segments
    from rich.style import Style

    small = picture.convert("RGB").resize((columns, 2 * rows))
    pixels: Any = small.load()
    segments = []
    for row in range(0, 2 * rows, 2):
        for column in range(columns):
            upper, lower = (Color.from_rgb(*pixels[column, row + half]) for half in (0, 1))
            segments.append(Segment(_UPPER_HALF, Style(color=upper, bgcolor=lower)))
        segments.append(Segment.line())
    return Segments(segments)
