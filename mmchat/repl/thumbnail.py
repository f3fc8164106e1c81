"""Small pictures in the terminal: by kitty's graphics protocol, by Sixel, or as half blocks."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmchat.repl import graphics
from mmchat.repl.render import MakeConsole
from mmchat.repl.terminal_probe import Answers, is_multiplexed

if TYPE_CHECKING:
    import PIL.Image

ThumbnailMode = Literal["auto", "off", "kitty", "sixel", "blocks"]
Way = Literal["off", "kitty", "sixel", "blocks"]
COLUMNS, ROWS = 32, 10
_UPPER_HALF = "▀"


@dataclass(frozen=True)
class Thumbnails:
    """How pictures are drawn. cell: height and width of a character in pixels."""

    way: Way = "off"
    cell: tuple[int, int] = (20, 10)
    sixel_colors: int = 256

    def draw(self, picture: PIL.Image.Image, make_console: MakeConsole, size: Any) -> str:
        """The characters that show `picture`, ending at the start of the line below it.

        size: columns and rows of the terminal.
        """
        if self.way == "off":
            return ""
        columns, rows = self._cells(picture.size, size)
        if self.way == "blocks":
            buffer = io.StringIO()
            make_console(buffer, size[0]).print(_blocks(picture, columns, rows), end="")
            return buffer.getvalue()
        small = picture.convert("RGB").resize((columns * self.cell[1], rows * self.cell[0]))
        if self.way == "kitty":
            drawn = graphics.kitty(small, columns, rows)
        else:
            drawn = graphics.sixel(small, self.sixel_colors)
        # Terminals leave the cursor in different places: make room, draw, put it back.
        return "\n" * rows + f"\x1b[{rows}A\x1b7{drawn}\x1b8\x1b[{rows}B"

    def _cells(self, size: tuple[int, int], terminal: tuple[int, int]) -> tuple[int, int]:
        """Columns and rows that keep the proportions and fit the terminal."""
        width, height = size
        ratio = self.cell[0] / self.cell[1]
        most_columns = max(min(COLUMNS, terminal[0] - 1), 1)
        most_rows = max(min(ROWS, terminal[1] - 3), 1)
        scale = min(most_columns / width, ratio * most_rows / height)
        columns, rows = round(width * scale), round(height * scale / ratio)
        return min(max(columns, 1), most_columns), min(max(rows, 1), most_rows)


def choose(mode: ThumbnailMode, answers: Answers) -> Thumbnails:
    """As asked for, or with `auto` the best that the terminal said it can do."""
    way: Way = _best(answers) if mode == "auto" else mode
    if way == "kitty" and is_multiplexed(os.environ):
        way = "blocks"  # tmux and screen take kitty's sequences for a title
    return Thumbnails(way, answers.cell or Thumbnails.cell, answers.sixel_colors)


def _best(answers: Answers) -> Way:
    if answers.kitty:
        return "kitty"
    if answers.sixel:
        return "sixel"
    no_colors = os.environ.get("TERM", "dumb") in ("dumb", "vt100") or os.environ.get("NO_COLOR")
    return "off" if no_colors else "blocks"


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
