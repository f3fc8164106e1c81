"""An answer as its reader wants it: text and calls of tools, as they come or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mmchat.engine.events import TokenLogprob
from mmchat.server.ask import Answering
from mmchat.server.openai_forms import entries
from mmchat.server.tool_calls import CallStream, Piece


class Told:
    """Iterate over the pieces that came together, and the probabilities of their tokens.

    It ends where nothing more is wanted: the engine writes no further than that. stream: all that
    was said so far.
    """

    def __init__(self, answering: Answering) -> None:
        plan = answering.plan
        self.answering = answering
        self.stream = CallStream(plan.names, parallel=plan.parallel)

    async def __aiter__(self) -> AsyncIterator[tuple[list[Piece], list[TokenLogprob]]]:
        """Raises ApiError."""
        async for deltas in self.answering:
            if self.stream.is_done:
                continue
            pieces = self.stream.feed("".join(delta.text for delta in deltas))
            if self.stream.is_done:
                self.answering.end()
            yield pieces, entries(deltas)
        if pieces := self.stream.end():
            yield pieces, []

    async def read(self) -> CallStream:
        """All of it. Raises ApiError."""
        async for _ in self:
            pass
        return self.stream

    @property
    def finish_reason(self) -> str:
        return self.stream.finish_reason(self.answering.finished.reason)
