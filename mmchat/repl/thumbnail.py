"""Small pictures in the terminal: by kitty's protocol, iTerm2's, by Sixel, or as half blocks."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from mmchat.repl import graphics
from mmchat.repl.render import MakeConsole
from mmchat.repl.terminal_probe import Answers, is_multiplexed

if TYPE_CHECKING:
    import PIL.Image

Way = Literal["off", "kitty", "iterm2", "sixel", "blocks"]
COLUMNS, ROWS = 32, 9  # of a picture that is attached
LARGE_COLUMNS, LARGE_ROWS = 110, 30  # of a drawing that was asked for
GAP = 2  # columns between a picture and what is said beside it
ROOM = 16  # columns; where there are fewer beside a picture, it is said below
_UPPER_HALF = "▀"


@dataclass(frozen=True)
class Thumbnails:
    """How pictures are drawn. cell: height and width of a character in pixels."""

    way: Way = "off"
    cell: tuple[int, int] = (20, 10)
    sixel_colors: int = 256

    def draw(
        self,
        picture: PIL.Image.Image,
        make_console: MakeConsole,
        size: tuple[int, int],
        facts: Callable[[int], list[str]] = lambda columns: [],
        *,
        is_large: bool = False,
    ) -> str:
        """The characters that show `picture`, ending at the start of the line below it.

        size: columns and rows of the terminal. facts: what is said beside the picture, as rows for
        so many columns. is_large: as large as the terminal is.
        """
        if self.way == "off":
            return ""
        columns, rows = self._cells(picture.size, size, is_large=is_large)
        room = size[0] - columns - GAP - 1
        beside, below = (facts(room), []) if room >= ROOM else ([], facts(size[0]))
        height = max(rows, len(beside))
        if self.way == "blocks":
            buffer = io.StringIO()
            make_console(buffer, size[0]).print(_blocks(picture, columns, rows), end="")
            drawn, gap = "", " " * GAP
            pieces = [*buffer.getvalue().splitlines(), *[" " * columns] * (height - rows)]
        else:
            # Terminals leave the cursor in different places: make room, draw, put it back.
            small = picture.convert("RGB").resize((columns * self.cell[1], rows * self.cell[0]))
            if self.way == "sixel":
                code = graphics.sixel(small, self.sixel_colors)
            else:
                make = graphics.kitty if self.way == "kitty" else graphics.iterm2
                code = make(small, columns, rows)
            drawn, gap = "\n" * height + f"\x1b[{height}A\x1b7{code}\x1b8", f"\x1b[{columns + GAP}C"
            pieces = [""] * height
        lines = [
            piece + (gap + fact if fact else "")
            for piece, fact in zip_longest(pieces, beside, fillvalue="")
        ]
        return drawn + "".join(f"{line}\n" for line in [*lines, *below])

    def _cells(
        self, size: tuple[int, int], terminal: tuple[int, int], *, is_large: bool
    ) -> tuple[int, int]:
        """Columns and rows that keep the proportions and fit the terminal."""
        width, height = size
        ratio = self.cell[0] / self.cell[1]
        most_columns = max(min(COLUMNS, terminal[0] * 2 // 5), 1)
        most_rows = max(min(ROWS, terminal[1] - 3), 1)
        if is_large:
            most_columns = max(min(LARGE_COLUMNS, terminal[0] - 1), 1)
            most_rows = max(min(LARGE_ROWS, terminal[1] - 10), most_rows)
        scale = min(most_columns / width, ratio * most_rows / height)
        columns, rows = round(width * scale), round(height * scale / ratio)
        return min(max(columns, 1), most_columns), min(max(rows, 1), most_rows)


def choose(mode: Literal["auto"] | Way, answers: Answers) -> Thumbnails:
    """As asked for, or with `auto` the best that the terminal said it can do."""
    nested = is_multiplexed(os.environ)
    no_colors = os.environ.get("TERM", "dumb") in ("dumb", "vt100") or os.environ.get("NO_COLOR")
    # The second name passes through ssh.
    names = {os.environ.get("TERM_PROGRAM"), os.environ.get("LC_TERMINAL")}
    known: dict[Way, bool] = {
        "kitty": answers.kitty,
        "iterm2": not nested and (answers.iterm2 or bool(names & {"iTerm.app", "iTerm2"})),
        "sixel": answers.sixel,
        "blocks": not no_colors,
        "off": True,
    }
    way: Way = next(w for w, can in known.items() if can) if mode == "auto" else mode
    if way in ("kitty", "iterm2") and nested:
        way = "blocks"  # tmux and screen take kitty's sequences for a title, and drop iTerm2's
    return Thumbnails(way, answers.cell or Thumbnails.cell, answers.sixel_colors)


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
