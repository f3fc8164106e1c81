"""Calls of tools, told from the text of an answer while it is written."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Collection, Generator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal

from mmchat.conversation import FinishReason, ToolCall, finish_reason

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
        self._is_between = bool(names)  # at the start, or behind a call
        self._pieces: list[tuple[CallBegin | int | None, str]] = []  # an int: of whose arguments
        self._held: list[str] = []  # what may turn out to be content
        self._ended = 0  # calls whose arguments are complete
        self._headers = _headers(names)
        self._sorted = sorted(self._headers)
        self._reading = self._read()
        next(self._reading)

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
            self._reading.send(char)
        return self._taken()

    def end(self) -> list[Piece]:
        """What was held back, once nothing follows."""
        if not (self.made and self._is_between):  # else it separates nothing
            self._release()
        return self._taken()

    def finish_reason(self, reason: FinishReason) -> Literal["stop", "length", "tool_calls"]:
        """As OpenAI's chat says it; an answer that was cut is of length, calls or not."""
        said = finish_reason(reason)
        return "tool_calls" if self.is_done or (said == "stop" and self.made) else said

    # ---- where in the answer: each `yield` is its next character

    def _read(self) -> Generator[None, str, None]:
        char = yield
        while True:
            if char == "{" and self._headers and (self._is_between or self._anywhere):
                self._is_between = False
                char = yield from self._call(char)
                continue
            if self._is_between and char in (_BETWEEN if self._anywhere else _SPACES):
                self._held.append(char)
            else:  # what may separate calls is content, then
                self._is_between = False
                self._release()
                self._pieces.append((None, char))
            char = yield

    def _call(self, char: str) -> Generator[None, str, str]:
        """What may be one, and the first character behind it."""
        header = ""  # without its white space
        while header not in self._headers:
            if header:
                char = yield
            is_space = char in _SPACES and header.count('"') % 2 == 0
            header += "" if is_space else char
            at = bisect_left(self._sorted, header)
            if at == len(self._sorted) or not self._sorted[at].startswith(header):
                self._release()
                return char  # which may begin a call itself
            self._held.append(char)
        self._held.clear()
        index = len(self.made)
        made = MadeCall(f"call_{secrets.token_hex(12)}", self._headers[header])
        self._pieces.append((CallBegin(index, made.id, made.name), ""))
        self.made.append(made)
        if char == "{":
            yield from self._to_the_end(char, index)
            self._ended += 1
            yield from self._to_the_end((yield), None, depth=1)
        else:
            self._pieces.append((index, "{}"))
            self._ended += 1
        self._is_between, self.is_done = self._anywhere, not self._parallel
        return (yield)

    def _to_the_end(
        self, char: str, index: int | None, depth: int = 0
    ) -> Generator[None, str, None]:
        """Of as many objects and lists as are open. index: the call whose arguments it is."""
        in_string = is_escaped = False
        while True:
            if index is not None:
                self._pieces.append((index, char))
            if is_escaped:
                is_escaped = False
            elif in_string:
                is_escaped, in_string = char == "\\", char != '"'
            else:
                in_string = char == '"'
                depth += (char in "{[") - (char in "}]")
            if not depth:
                return
            char = yield

    # ---- what comes out

    def _release(self) -> None:
        self._pieces += [(None, char) for char in self._held]
        self._held.clear()

    def _taken(self) -> list[Piece]:
        taken: list[Piece] = []
        for kind, group in groupby(self._pieces, itemgetter(0)):
            text = "".join(text for _, text in group)
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
