"""Draws `assets/chat.svg` for the README: a short chat with the built-in model.

python -m tests.repl.draw_evening [MODEL] [FILE.svg]
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

from tests.repl.terminals import ROOT, ChatTerminal

LINES = (
    "assets/dog.jpg What's in this image?",
    "What colour is the dog?",
    "assets/street.jpg What's in this image?",
)
_NAMES = {"brown": "yellow", "default": None}


class DrawnTerminal(ChatTerminal):
    """Shows what is dim in grey: pyte knows no dim."""

    def write(self, text: str) -> None:
        super().write(re.sub(r"\x1b\[(0;)?2m", "\x1b[\\g<1>90m", text))


def color(name: str) -> str | None:
    """A pyte colour as rich names it."""
    if name in _NAMES:
        return _NAMES[name]
    is_hex = len(name) == 6 and all(c in "0123456789abcdef" for c in name)
    return f"#{name}" if is_hex else name.replace("bright", "bright_")


def picture_of(chat: ChatTerminal) -> Text:
    """The scrollback and the screen with their colours."""
    text = Text()
    rows = [*chat.screen.history.top, *(chat.screen.buffer[y] for y in range(chat.screen.lines))]
    for row in rows:
        cells = [row[column] for column in range(chat.screen.columns)]
        for (fg, bg, bold), run in groupby(cells, key=lambda c: (c.fg, c.bg, c.bold)):
            style = Style(color=color(fg), bgcolor=color(bg), bold=bold)
            shown = "".join(cell.data for cell in run)
            blank = len(shown) - len(shown.lstrip(" "))
            text.append(" " * blank, Style(bgcolor=style.bgcolor))  # else some viewers drop it
            text.append(shown[blank:], style)
        text.append("\n")
    text.rstrip()
    return text


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "assets" / "chat.svg"
    with tempfile.TemporaryDirectory() as folder:
        chat = DrawnTerminal(Path(folder), model=model, cwd=ROOT)
        for line in LINES:
            chat.line(line)
        drawn = picture_of(chat)
        chat.send("\x04")
        chat.end()
    console = Console(record=True, width=90, file=io.StringIO(), force_terminal=True)
    console.print(drawn, soft_wrap=True)
    drawing = console.export_svg(title="mmchat chat")
    target.write_text(re.sub(r"@font-face {.*?}", "", drawing, flags=re.DOTALL))  # no web fonts


if __name__ == "__main__":
    main()
