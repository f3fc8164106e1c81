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
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mmchat.terminal import Sanitizer

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console

TAIL_ROWS = 6
FRAME_SECONDS = 0.05
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$")
_CLOSE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*$")
_LEFT_TO_RIGHT = "\N{LEFT-TO-RIGHT MARK}"

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
        shown = self._tail.draw(unfinished, gap=self._gap_before_tail())
        if erased + committed + shown:
            self._write(erased + committed + shown)

    def _gap_before_tail(self) -> bool:
        return self._started and not self._blocks.joins_last

    def _render(self, block: Block) -> str:
        """One finished block, as it stays on the screen."""
        gap = "\n" if self._started and not block.joined else ""
        self._started = True
        columns = max(self._size()[0], 10)
        buffer = io.StringIO()
        console = self._make_console(buffer, columns)
        if block.kind == "code":
            return gap + _code(console, buffer, block.source)
        from rich.markdown import Markdown

        console.print(Markdown(block.source, hyperlinks=False), end="")
        lines = [_without_padding(line) for line in buffer.getvalue().split("\n")]
        text = "\n".join(lines).strip("\n")
        return f"{gap}{text}\n" if text else ""


def _without_padding(line: str) -> str:
    """Rich fills lines up to the width; copied text should not have that."""
    return re.sub(r"[ ]+((?:\x1b\[[0-9;]*m)*)$", r"\1", line)


def _code(console: Console, buffer: io.StringIO, source: str) -> str:
    """A line of code, unwrapped so that copying it gives one line."""
    from rich.text import Text

    console.print(Text(source.expandtabs(4), style="cyan"), soft_wrap=True, end="")
    return buffer.getvalue() + "\n"


class Block:
    """Markdown that is complete. joined: no empty line stands before it."""

    def __init__(self, kind: str, source: str, *, joined: bool) -> None:
        self.kind = kind  # "markdown" or "code"
        self.source = source
        self.joined = joined


class BlockReader:
    """Cuts a stream of Markdown into finished blocks, line by line.

    A top-level block is finished when another one follows it; an item of a list when the next item
    follows; a line of fenced code when it ends.
    """

    def __init__(self) -> None:
        self.finished: list[Block] = []
        self.joins_last = False  # whether what is unfinished continues the last block
        self._lines: list[str] = []  # complete, not yet in a finished block
        self._line = ""  # incomplete
        self._fence = ""  # the marker that opened the code
        self._markdown: MarkdownIt | None = None

    @property
    def unfinished(self) -> str:
        return "\n".join([*self._lines, self._line]).lstrip("\n")

    def take(self) -> list[Block]:
        finished, self.finished = self.finished, []
        return finished

    def feed(self, text: str) -> None:
        *lines, rest = text.split("\n")
        for line in lines:
            self._end_line(self._line + line)
            self._line = ""
        self._line += rest

    def finish(self) -> None:
        """What is left is one last block."""
        if self._line:
            self._end_line(self._line)
            self._line = ""
        self._commit(len(self._lines))

    def _end_line(self, line: str) -> None:
        if self._fence:
            closing = _CLOSE.match(line)
            if closing and closing[1].startswith(self._fence):
                self._fence = ""
                self.joins_last = False
            else:
                self.finished.append(Block("code", line, joined=self.joins_last))
                self.joins_last = True
            return
        self._lines.append(line)
        if line.strip():
            self._advance()

    def _advance(self) -> None:
        """Commit all blocks but the last, all items but the last, and enter code."""
        tokens = self._parse("\n".join(self._lines))
        tops = [t for t in tokens if t.level == 0 and t.map and t.nesting >= 0]
        if len(tops) > 1:
            self._commit(_first_line(tops[-1]))
        elif tops and tops[-1].type in ("bullet_list_open", "ordered_list_open"):
            items = [t for t in tokens if t.type == "list_item_open" and t.level == 1]
            if len(items) > 1:
                self._commit(_first_line(items[-1]), in_list=True)
                return
        if tops and tops[-1].type == "fence":
            opening = _FENCE.match(self._lines[-1])
            if opening and len("\n".join(self._lines).strip().split("\n")) == 1:
                self._fence = opening[1]
                self._lines = []
                self.joins_last = False

    def _commit(self, count: int, *, in_list: bool = False) -> None:
        source = "\n".join(self._lines[:count]).strip("\n")
        self._lines = self._lines[count:]
        if source:
            self.finished.append(Block("markdown", source, joined=self.joins_last))
            self.joins_last = in_list

    def _parse(self, source: str) -> list[Token]:
        if self._markdown is None:
            from markdown_it import MarkdownIt

            # Only the structure of blocks is needed, so inline text is not parsed.
            self._markdown = MarkdownIt("commonmark").enable("table").disable("inline")
        return self._markdown.parse(source)


def _first_line(token: Token) -> int:
    return token.map[0] if token.map else 0


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
