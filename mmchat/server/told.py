"""An answer as its reader wants it: text and calls of tools, as they come or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from mmchat.engine.events import TokenLogprob
from mmchat.server.ask import Answering
from mmchat.server.openai_forms import entries
from mmchat.server.tool_calls import CallArguments, CallBegin, CallStream, Content, Piece


@dataclass
class MadeCall:
    """arguments: JSON text as far as it was written."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Whole:
    """All that was said so far."""

    text: str = ""
    calls: list[MadeCall] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        match piece:
            case Content(text):
                self.text += text
            case CallBegin(_, id_, name):
                self.calls.append(MadeCall(id_, name))
            case CallArguments(index, text):
                self.calls[index].arguments += text


class Told:
    """Iterate over the pieces that came together, and the probabilities of their tokens.

    It ends where nothing more is wanted: the engine writes no further than that.
    """

    def __init__(self, answering: Answering) -> None:
        plan = answering.plan
        self.answering = answering
        self.stream = CallStream(plan.names, parallel=plan.parallel, anywhere=not plan.is_strict)
        self.whole = Whole()

    async def __aiter__(self) -> AsyncIterator[tuple[list[Piece], list[TokenLogprob]]]:
        """Raises ApiError."""
        async for deltas in self.answering:
            if self.stream.is_done:
                continue
            pieces = self.stream.feed("".join(delta.text for delta in deltas))
            if self.stream.is_done:
                self.answering.end()
            yield self._kept(pieces), entries(deltas)
        if pieces := self.stream.end():
            yield self._kept(pieces), []

    async def read(self) -> Whole:
        """All of it. Raises ApiError."""
        async for _ in self:
            pass
        return self.whole

    @property
    def finish_reason(self) -> str:
        return self.stream.finish_reason(self.answering.finished.reason)

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            self.whole.add(piece)
        return pieces
