"""Shows Markdown while it is written: finished blocks for good, the rest as a short live tail.

What is above the tail is never touched again, so that the scrollback holds every line once. The
tail is at most a few rows of plain text, erased and drawn anew. Decisions depend on whole lines
only, so the result is the same however the text was cut into pieces.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from mmchat.repl.blocks import TAIL_ROWS, Block, BlockReader
from mmchat.terminal import Sanitizer, sanitize

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

FRAME_SECONDS = 0.05

MakeConsole = Callable[[io.StringIO, int], "Console"]  # (file, columns)
Size = Callable[[], tuple[int, int]]  # -> columns, rows


class MarkdownStream:
    """Feed it pieces of Markdown; it writes to a terminal. Escape sequences are taken out."""

    def __init__(
        self,
        write: Callable[[str], None],
        make_console: MakeConsole,
        size: Size,
        *,
        clock: Callable[[], float] = time.monotonic,
        reflows: bool | None = None,
    ) -> None:
        self._write = write
        self._make_console = make_console
        self._size = size
        self._clock = clock
        self._sanitizer = Sanitizer()
        self._blocks = BlockReader()
        self._tail = Tail(size, terminal_reflows(os.environ) if reflows is None else reflows)
        self._drawn_at = -FRAME_SECONDS
        self._started = False

    def feed(self, text: str) -> None:
        """Take the next piece; draws at most once in FRAME_SECONDS, finished blocks at once."""
        self._blocks.feed(self._sanitizer.feed(text))
        now = self._clock()
        if self._blocks.finished or now - self._drawn_at >= FRAME_SECONDS:
            self._drawn_at = now
            self._draw(self._blocks.unfinished)

    def finish(self) -> None:
        """Everything that came is final; leaves the cursor at the start of a line."""
        self._blocks.finish()
        self._draw("")

    def _draw(self, unfinished: str) -> None:
        erased = self._tail.erase()
        committed = "".join(map(self._render, self._blocks.take()))
        gap = self._started and not self._blocks.joins_last
        shown = self._tail.draw(unfinished, gap=gap)
        if erased + committed + shown:
            self._write(erased + committed + shown)

    def _render(self, block: Block) -> str:
        """One finished block, as it stays on the screen."""
        gap = "\n" if self._started and not block.joined else ""
        self._started = True
        columns = max(self._size()[0], 10)
        buffer = io.StringIO()
        console = self._make_console(buffer, columns)
        if block.kind != "markdown":
            from rich.text import Text

            # As it is, unwrapped so that copying a line gives one line
            style = "cyan" if block.kind == "code" else ""
            console.print(Text(block.source.expandtabs(4), style=style), soft_wrap=True, end="")
            return f"{gap}{buffer.getvalue()}\n"
        console.print(_Drawn(block.source), end="")
        # Rich fills lines up to the width; copied text should not have that.
        padding = r"(?m)[ ]+((?:\x1b\[[0-9;]*m)*)$"
        text = re.sub(padding, r"\1", buffer.getvalue()).strip("\n")
        return f"{gap}{text}\n" if text else ""


class _Drawn:
    """Markdown, sanitized where it is drawn: an entity may stand for what the source may not."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.markdown import Markdown
        from rich.segment import Segment

        for text, style, control in console.render(Markdown(self._source, hyperlinks=False)):
            yield Segment(sanitize(text), style, control)


class Tail:
    """The live rows at the bottom: plain text that is drawn, erased and drawn again."""

    def __init__(self, size: Size, reflows: bool) -> None:
        self._size = size
        self._reflows = reflows
        self._widths: list[int] = []  # cells of each row on the screen

    def draw(self, text: str, *, gap: bool) -> str:
        """The characters that show the last rows of `text`, ending on its last row."""
        if not text.strip():
            return ""
        columns, rows = self._size()
        most = max(1, min(TAIL_ROWS, rows - 2))
        lines = [row for line in text.split("\n") for row in wrapped(line, max(columns - 1, 2))]
        shown = ([""] if gap else []) + lines
        shown = shown[-most:]
        from rich.cells import cell_len

        self._widths = [cell_len(line) for line in shown]
        return "\n".join(shown)

    def erase(self) -> str:
        """The characters that take the rows away and put the cursor where they began."""
        if not self._widths:
            return ""
        columns, screen_rows = self._size()
        rows = len(self._widths)
        if self._reflows:  # a terminal that was made narrower has wrapped them
            rows = sum(max(1, -(-width // max(columns, 1))) for width in self._widths)
        self._widths = []
        up = min(rows, screen_rows) - 1
        return "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J"


def wrapped(line: str, columns: int) -> list[str]:
    """`line` as rows of at most `columns` cells, broken at spaces where there are any."""
    from rich.cells import cell_len, chop_cells

    line = line.expandtabs(4)
    if cell_len(line) <= columns:
        return [line]
    rows, row = [], ""
    for word in re.findall(r"[^ ]+ *| +", line):
        if cell_len(row + word.rstrip()) <= columns:
            row += word
            continue
        if row:
            rows.append(row.rstrip())
        *full, row = chop_cells(word, columns) or [""]
        rows += full
    return [*rows, row.rstrip()]


def terminal_reflows(environment: Mapping[str, str]) -> bool:
    """Whether the terminal wraps its rows anew when its width changes; most do."""
    kind = environment.get("TERM", "")
    return "XTERM_VERSION" not in environment and not kind.startswith(("screen", "linux", "vt"))
