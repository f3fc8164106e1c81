"""Make text from outside safe for a terminal: model output, file names, server messages.

A terminal obeys escape sequences: they can rewrite what is on the screen, set the clipboard
(OSC 52) or hide a link (OSC 8), and a picture can make a model write one. Only text bound for a
terminal passes through here; pipes and files get every character as it came.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from enum import Enum, auto

# Shown where an escape sequence was taken out, so that nothing vanishes unseen.
ESCAPE_MARK = "\N{SYMBOL FOR ESCAPE}"

# Bidirectional embeddings, overrides and isolates: they reorder what the reader sees.
_BIDI = frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
_LINE_BREAKS = {ord(char): repr(char)[1:-1] for char in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_STRING_STARTS_7BIT = frozenset("]PX^_")  # after ESC: OSC, DCS, SOS, PM, APC
_STRING_STARTS_C1 = frozenset("\x90\x98\x9d\x9e\x9f")
_UNIT = re.compile(r"'[^']*'\S*|\S+")  # a word; a quoted name or command counts as one
_STRING_ENDS = frozenset("\x07\x18\x1a\x9c")  # BEL, CAN, SUB, ST


class _State(Enum):
    GROUND = auto()
    ESCAPE = auto()  # after ESC
    INTERMEDIATE = auto()  # ESC and at least one of 0x20-0x2F
    CSI = auto()
    STRING = auto()


class Sanitizer:
    """Removes escape sequences and control characters from a stream that is cut anywhere.

    `feed(a) + feed(b)` equals `feed(a + b)` for every cut. What comes out holds no control
    character but newline and tab, no bidirectional control and no tag character. A sequence that
    is never finished hides at most the rest of its line.
    """

    def __init__(self) -> None:
        self._state = _State.GROUND

    def feed(self, text: str) -> str:
        """The harmless part of `text`; an open sequence is remembered for the next call."""
        return "".join(map(self._step, text))

    def _step(self, char: str) -> str:
        """Consume one character and return what is shown for it."""
        if char == "\n":  # ends any sequence
            self._state = _State.GROUND
            return char
        if self._state is _State.GROUND:
            return self._ground(char)
        if char == "\x1b":
            self._state = _State.ESCAPE
            return ""
        if self._state is _State.STRING:
            if char in _STRING_ENDS:
                self._state = _State.GROUND
            return ""
        if self._state is _State.ESCAPE and char == "[":
            self._state = _State.CSI
            return ""
        if self._state is _State.ESCAPE and char in _STRING_STARTS_7BIT:
            self._state = _State.STRING
            return ""
        return self._inside(char)

    def _inside(self, char: str) -> str:
        """A character within ESC, ESC intermediates or CSI that opens nothing new."""
        if char < " " and char not in "\x18\x1a":  # a control inside a sequence; it goes on
            return ""
        if " " <= char <= "/":
            if self._state is _State.ESCAPE:
                self._state = _State.INTERMEDIATE
            return ""
        is_parameter = self._state is _State.CSI and "0" <= char <= "?"
        if is_parameter:
            return ""
        self._state, was = _State.GROUND, self._state
        is_final = ("@" if was is _State.CSI else "0") <= char <= "~"
        return "" if is_final else self._ground(char)

    def _ground(self, char: str) -> str:
        if " " <= char <= "~" or char == "\t":
            return char
        if char == "\x1b":
            self._state = _State.ESCAPE
            return ESCAPE_MARK
        if char == "\x9b":
            self._state = _State.CSI
            return ESCAPE_MARK
        if char in _STRING_STARTS_C1:
            self._state = _State.STRING
            return ESCAPE_MARK
        if char < "\xa0" or char in _BIDI or "\U000e0000" <= char <= "\U000e007f":
            return ""
        return char


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
