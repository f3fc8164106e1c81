"""Calls of tools, told from the text of an answer while it is written."""

from __future__ import annotations

import secrets
import string
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mmchat.conversation import FinishReason, ToolCall

_ID_LETTERS = string.ascii_letters + string.digits
_SPACES = " \t\r\n"
_BETWEEN = _SPACES + ";,[]"  # calls, and around a list of them


@dataclass(frozen=True)
class Content:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a declared tool; what it is given comes next."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments' JSON text; all pieces together are that text, unchanged."""

    index: int
    text: str


Piece = Content | CallBegin | CallArguments


@dataclass
class MadeCall:
    """arguments: JSON text as far as it was written."""

    id: str
    name: str
    arguments: str = ""


def new_id() -> str:
    """As OpenAI's look."""
    return "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(24))


class CallStream:
    """Characters of an answer in, content and calls out: each character is looked at once.

    So it does not matter where the text is cut into deltas. Text is held back only while it can
    still be the beginning of a call `{"name": …, "parameters": {…}}` of one of `names`. Calls may
    stand beside text, and be separated by `;`, `,` or line breaks. What is like a call of another
    name is content. anywhere: else a call is told at the beginning only, which is where a grammar
    that lets text come as well binds it.

    text: the content so far. made: the calls so far. is_done: nothing that follows is wanted, as
    after the first call if they are not `parallel`.
    """

    def __init__(
        self, names: Collection[str], *, parallel: bool = True, anywhere: bool = True
    ) -> None:
        self.text = ""
        self.made: list[MadeCall] = []
        self.is_done = False
        self._parallel, self._anywhere = parallel, anywhere
        self._step = self._between if names else self._text
        self._pieces: list[tuple[CallBegin | int | None, list[str]]] = []
        self._held: list[str] = []  # what may turn out to be content
        self._ended = 0  # calls
        self._headers = _headers(names)
        self._sorted = sorted(self._headers)
        self._header = ""  # of the call that may have begun, without its white space
        self._nesting = _Nesting()

    @property
    def cut(self) -> str:
        """The text of a call that was begun, and whose arguments did not end."""
        rest = self.made[self._ended :]
        return "".join(f'{{"name": "{one.name}", "parameters": {one.arguments}' for one in rest)

    @property
    def calls(self) -> list[ToolCall]:
        """Those whose arguments are complete."""
        return [ToolCall(made.name, made.arguments) for made in self.made[: self._ended]]

    def feed(self, text: str) -> list[Piece]:
        """What is certain after this text; neighbours of a kind are one piece."""
        for char in text:
            if self.is_done:
                break
            self._step(char)
        return self._taken()

    def end(self) -> list[Piece]:
        """What was held back, once nothing follows."""
        if not (self.made and self._step == self._between):  # else it separates nothing
            self._release()
        if self._step == self._behind_arguments:
            self._ended += 1
        return self._taken()

    def finish_reason(self, reason: FinishReason) -> Literal["stop", "length", "tool_calls"]:
        """As OpenAI's chat says it; an answer that was cut is of length, calls or not."""
        is_whole = reason in ("stop", "stop_string")
        if self.is_done or (is_whole and self.made):
            return "tool_calls"
        return "stop" if is_whole else "length"

    # ---- where in the answer

    def _text(self, char: str) -> None:
        if char == "{" and self._headers and self._anywhere:
            self._begin_header(char)
        else:
            self._add(None, char)

    def _between(self, char: str) -> None:
        """At the start, or behind a call."""
        if char == "{":
            self._begin_header(char)
        elif char in (_BETWEEN if self._anywhere else _SPACES):
            self._held.append(char)
        else:  # what may separate calls is content, then
            self._release()
            self._step = self._text
            self._text(char)

    def _begin_header(self, char: str) -> None:
        self._header = ""
        self._step = self._in_header
        self._in_header(char)

    def _in_header(self, char: str) -> None:
        is_between = char in _SPACES and self._header.count('"') % 2 == 0
        self._header += "" if is_between else char
        at = bisect_left(self._sorted, self._header)
        if self._header in self._headers:
            self._begin_call(char)
        elif at < len(self._sorted) and self._sorted[at].startswith(self._header):
            self._held.append(char)
        else:
            self._release()
            self._step = self._text
            self._text(char)  # which may begin a call itself

    def _begin_call(self, char: str) -> None:
        self._held.clear()
        made = MadeCall(new_id(), self._headers[self._header])
        self._pieces.append((CallBegin(len(self.made), made.id, made.name), []))
        self.made.append(made)
        self._nesting = _Nesting()
        if char == "{":
            self._step = self._in_arguments
            self._in_arguments(char)
        else:
            self._add(len(self.made) - 1, "{}")
            self._end_call()

    def _in_arguments(self, char: str) -> None:
        self._add(len(self.made) - 1, char)
        if not self._nesting.feed(char):
            self._nesting.depth = 1  # of the call, whose end is looked for now
            self._step = self._behind_arguments

    def _behind_arguments(self, char: str) -> None:
        if not self._nesting.feed(char):
            self._end_call()

    def _end_call(self) -> None:
        self._ended += 1
        self._step = self._between if self._anywhere else self._text
        self.is_done = not self._parallel

    # ---- what comes out

    def _release(self) -> None:
        if self._held:
            self._add(None, "".join(self._held))
            self._held.clear()

    def _add(self, kind: int | None, text: str) -> None:
        """kind: the call whose arguments it is part of, None for content."""
        if not self._pieces or self._pieces[-1][0] != kind:
            self._pieces.append((kind, []))
        self._pieces[-1][1].append(text)

    def _taken(self) -> list[Piece]:
        taken: list[Piece] = []
        for kind, texts in self._pieces:
            text = "".join(texts)
            if isinstance(kind, CallBegin):
                taken.append(kind)
            elif kind is None:
                self.text += text
                taken.append(Content(text))
            else:
                self.made[kind].arguments += text
                taken.append(CallArguments(kind, text))
        self._pieces.clear()
        return taken


def _headers(names: Collection[str]) -> dict[str, str]:
    """Each beginning of a call, up to the `{` of its arguments, without white space -> its name.

    White space may stand between any two words. Models write `arguments` for `parameters`, some say
    first that it is a function, and some end a call that has no arguments.
    """
    return {
        f'{{{kind}"name":"{name}"{rest}': name
        for name in names
        for kind in ("", '"type":"function",')
        for rest in (',"parameters":{', ',"arguments":{', "}")
    }


class _Nesting:
    """How deep in objects and lists a JSON text is; what strings hold does not count."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = self._is_escaped = False

    def feed(self, char: str) -> int:
        """The depth after this character."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1
        return self.depth
