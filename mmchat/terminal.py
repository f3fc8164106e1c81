"""Make text from outside safe for a terminal: model output, file names, server messages.

A terminal obeys escape sequences: they can rewrite what is on the screen, set the clipboard
(OSC 52) or hide a link (OSC 8), and a picture can make a model write one. Only text bound for a
terminal passes through here; pipes and files get every character as it came.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

# Shown where an escape sequence was taken out, so that nothing vanishes unseen.
ESCAPE_MARK = "\N{SYMBOL FOR ESCAPE}"

# Controls, and what reorders what the reader sees (bidirectional embeddings, overrides and
# isolates) or hides in it (tags)
_DROPPED = dict.fromkeys(
    [
        *range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F),
        *range(0x2066, 0x206A), *range(0xE0000, 0xE0080),
    ],
    "",
)  # fmt: skip
_LINE_BREAKS = {ord(char): repr(char)[1:-1] for char in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_UNIT = re.compile(r"'[^']*'\S*|\S+")  # a word; a quoted name or command counts as one

# Each state is the pattern of what goes on with it: plain text, or the inside of a sequence, where
# the terminal obeys most controls without ending it.
_INSIDE = r"\x00-\x09\x0b-\x17\x19\x1c-\x1f"
_GROUND = re.compile(r"[^\x1b\x90\x98\x9b\x9d-\x9f]*")
_ESCAPE = re.compile(rf"[{_INSIDE}]*")
_INTERMEDIATE = re.compile(rf"[{_INSIDE} -/]*")
_CSI = re.compile(rf"[{_INSIDE} -?]*")  # with parameters
_STRING = re.compile(r"[^\n\x07\x18\x1a\x1b\x9c]*")  # OSC, DCS, SOS, PM, APC
_AGAIN = {"\x1b": _ESCAPE}
_OPENED = {  # by the character that leaves a state for another one
    _GROUND: {**_AGAIN, "\x9b": _CSI, **dict.fromkeys("\x90\x98\x9d\x9e\x9f", _STRING)},
    _ESCAPE: {
        **_AGAIN,
        "[": _CSI,
        **dict.fromkeys("]PX^_", _STRING),
        **dict.fromkeys(map(chr, range(0x20, 0x30)), _INTERMEDIATE),
    },
}


class Sanitizer:
    """Removes escape sequences and control characters from a stream that is cut anywhere.

    `feed(a) + feed(b)` equals `feed(a + b)` for every cut. What comes out holds no control
    character but newline and tab, no bidirectional control and no tag character. A sequence that
    is never finished hides at most the rest of its line.
    """

    def __init__(self) -> None:
        self._state = _GROUND

    def feed(self, text: str) -> str:
        """The harmless part of `text`; an open sequence is remembered for the next call."""
        pieces: list[str] = []
        at = 0
        while found := self._state.match(text, at):
            end, is_plain = found.end(), self._state is _GROUND
            if is_plain:
                pieces.append(found[0].translate(_DROPPED))
            if end == len(text):
                break
            char = text[end]
            if opened := _OPENED.get(self._state, _AGAIN).get(char):
                pieces.append(ESCAPE_MARK if is_plain else "")
                at, self._state = end + 1, opened
            else:  # the last character of a sequence, or one that has no place in it
                is_last = "0" <= char <= "~" or self._state is _STRING
                at = end + 1 if is_last and char != "\n" else end
                self._state = _GROUND
        return "".join(pieces)


def sanitize(text: str) -> str:
    """`text` as a terminal may show it; for whole strings such as error messages."""
    return Sanitizer().feed(text)


class AnswerStream:
    """An answer on its way to `write`, piece by piece, ending with a newline.

    sanitizes: for a terminal.
    """

    def __init__(self, write: Callable[[str], None], *, sanitizes: bool) -> None:
        self._write = write
        self._sanitizer = Sanitizer() if sanitizes else None
        self._last = ""

    def feed(self, text: str) -> None:
        if shown := self._sanitizer.feed(text) if self._sanitizer else text:
            self._last = shown[-1]
            self._write(shown)

    def finish(self) -> None:
        if self._last != "\n":
            self._write("\n")
        self._last = "\n"


def one_line(text: str) -> str:
    """`text` with its line breaks written as escapes, so that a name cannot forge a line."""
    return text.translate(_LINE_BREAKS)


def filled(text: str, columns: int, indent: str = "") -> str:
    """`text` on lines of at most `columns` cells, broken at spaces; all but the first indented.

    A path, an address or a quoted command stays whole, so that it can be copied; one that is wider
    than the terminal is left for the terminal to wrap.
    """
    return "\n".join(_filled_line(line, columns, indent) for line in text.split("\n"))


def _filled_line(line: str, columns: int, indent: str) -> str:
    if cells(line) <= columns:
        return line
    return hanging(line[: len(line) - len(line.lstrip(" "))], line, columns, indent)


def hanging(head: str, text: str, columns: int, indent: str) -> str:
    """`head`, a space and the words of `text`, on lines as those of `filled`.

    Between words of one line are as many spaces as were, so that columns of a table stay.
    """
    rows, end = [head], 0
    for found in _UNIT.finditer(text):
        word, gap = found[0], text[end : found.start()] if end else " "
        end = found.end()
        longer = rows[-1] + gap + word if rows[-1].strip() else rows[-1] + word
        if cells(longer) <= columns or not rows[-1].strip():
            rows[-1] = longer
        else:
            rows.append(indent + word)
    return "\n".join(rows)


def labelled(rows: Sequence[tuple[str, str]], columns: int) -> str:
    """(label, value); values wrap in their column, or where it is narrow under their label."""
    width = max(cells(label) for label, _ in rows) + 2
    is_narrow = width > columns // 2 and any(width + cells(v) > columns for _, v in rows)
    lines = []
    for label, value in rows:
        head = label + " " * (1 if is_narrow else width - cells(label) - 1)
        text = hanging(head, one_line(value), columns, " " * (4 if is_narrow else width))
        lines.append(sanitize(text).rstrip())
    return "\n".join(lines)


def cells(text: str) -> int:
    """Columns that `text` takes: two for a wide glyph, none for a combining mark."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
