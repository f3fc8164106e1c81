"""Cuts Markdown that is still being written into blocks that are complete."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

TAIL_ROWS = 6
BLOCK_CHARACTERS = 32_768
LINE_CHARACTERS = 8_192
READINGS = 16
SHORT = 256  # characters; at the start there is little to read again
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$")
_CLOSE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*$")

Kind = Literal["markdown", "code", "plain"]


class Block:
    """Markdown that is complete. joined: no empty line stands before it."""

    def __init__(self, kind: Kind, source: str, *, joined: bool) -> None:
        self.kind = kind
        self.source = source
        self.joined = joined


class BlockReader:
    """Cuts a stream of Markdown into finished blocks, line by line.

    A top-level block is finished when another one follows it; an item of a list when the next item
    follows; a line of fenced code when it ends. A block over BLOCK_CHARACTERS is plain text up to
    its next empty line, and a line over LINE_CHARACTERS is cut at a space. To find blocks, pending
    lines are parsed again and again, but in all not more than READINGS times what came.
    """

    def __init__(self) -> None:
        self.finished: list[Block] = []
        self.joins_last = False  # whether what is unfinished continues the last block
        self._lines: list[str] = []  # complete, not yet in a finished block
        self._pieces: list[str] = []  # of the line that is incomplete
        self._length = 0  # of the pieces
        self._fence = ""  # the marker that opened the code
        self._is_plain = False
        self._came = self._parsed = self._pending = 0  # characters
        self._markdown: MarkdownIt | None = None

    @property
    def unfinished(self) -> str:
        """The end of what is not yet finished: as many lines as a tail may have rows."""
        return "\n".join([*self._lines[-TAIL_ROWS:], "".join(self._pieces)]).lstrip("\n")

    def take(self) -> list[Block]:
        finished, self.finished = self.finished, []
        return finished

    def feed(self, text: str) -> None:
        *lines, rest = text.split("\n")
        for line in lines:
            self._extend(line)
            self._end_line(self._take_line())
        self._extend(rest)

    def finish(self) -> None:
        """What is left is one last block."""
        if self._length:
            self._end_line(self._take_line())
        self._commit(len(self._lines))

    def _extend(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)
        if self._length <= LINE_CHARACTERS:
            return
        line, start = self._take_line(), 0
        while len(line) - start > LINE_CHARACTERS:
            end = line.rfind(" ", start + 1, start + LINE_CHARACTERS) + 1
            end = end or start + LINE_CHARACTERS
            self._end_line(line[start:end])
            start = end
        self._extend(line[start:])

    def _take_line(self) -> str:
        line = "".join(self._pieces)
        self._pieces, self._length = [], 0
        return line

    def _end_line(self, line: str) -> None:
        self._came += len(line) + 1
        if self._is_plain and not line.strip():
            self._is_plain = self.joins_last = False
        elif self._is_plain:
            self.finished.append(Block("plain", line, joined=True))
        elif self._fence:
            closing = _CLOSE.match(line)
            if closing and closing[1].startswith(self._fence):
                self._fence = ""
                self.joins_last = False
            else:
                self.finished.append(Block("code", line, joined=self.joins_last))
                self.joins_last = True
        else:
            self._lines.append(line)
            self._pending += len(line) + 1
            if self._pending > BLOCK_CHARACTERS:
                self._commit(len(self._lines), kind="plain")
                self._is_plain = True
            elif line.strip() and self._may_parse():
                self._advance()

    def _may_parse(self) -> bool:
        """Sooner where another block probably begins than elsewhere."""
        follows_empty = len(self._lines) > 1 and not self._lines[-2].strip()
        readings = READINGS if follows_empty or _FENCE.match(self._lines[-1]) else READINGS // 2
        return self._parsed + self._pending <= readings * (self._came + SHORT)

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
                self._lines, self._pending = [], 0
                self.joins_last = False

    def _commit(self, count: int, *, in_list: bool = False, kind: Kind = "markdown") -> None:
        source = "\n".join(self._lines[:count]).strip("\n")
        self._lines = self._lines[count:]
        self._pending = sum(map(len, self._lines)) + len(self._lines)
        if source:
            self.finished.append(Block(kind, source, joined=self.joins_last))
            self.joins_last = in_list

    def _parse(self, source: str) -> list[Token]:
        self._parsed += len(source)
        if self._markdown is None:
            from markdown_it import MarkdownIt

            # Only the structure of blocks is needed, so inline text is not parsed.
            self._markdown = MarkdownIt("commonmark").enable("table").disable("inline")
        return self._markdown.parse(source)


def _first_line(token: Token) -> int:
    return token.map[0] if token.map else 0
