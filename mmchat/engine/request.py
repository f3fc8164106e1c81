"""What is asked of the engine, and the answer that it fills."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mmchat import words
from mmchat.engine.events import Event, Finished, Timings, Usage
from mmchat.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from mmchat.engine.grammar import Grammar
    from mmchat.engine.sampling import SamplingParams
    from mmchat.models.base import Watch
    from mmchat.models.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to answer. owner: prompts of one owner share what is cached, of others nothing.

    ignore_stop: write on after tokens that end an answer. timings: what was measured so far; the
    rest is filled in. score_from: log-probabilities of the prompt's tokens from this one on are
    wanted; at least 1, and behind all pictures. Raises ValueError if it
    is not. grammar: what the answer must be. watch: what is seen of pictures is wanted, from its
    first position on.
    """

    prompt: Prompt
    sampling: SamplingParams
    owner: str = ""
    ignore_stop: bool = False
    timings: Timings = field(default_factory=Timings)
    score_from: int | None = None
    grammar: Grammar | None = None
    watch: Watch | None = None

    def __post_init__(self) -> None:
        behind = max((placed.end for placed in self.prompt.media), default=1)
        if self.score_from is not None and self.score_from < behind:
            raise ValueError(f"score_from must be {behind} or more, not {self.score_from}")

    @property
    def shareable(self) -> int:
        """How many positions need not be read again where a cache holds them.

        Logits are needed of the last, and of those before tokens that are scored.
        """
        most = len(self.prompt.token_ids) - 1
        if self.score_from is not None:
            most = min(most, self.score_from - 1)
        return most if self.watch is None else min(most, self.watch.first)

    def unanswered(self) -> Finished:
        """The end of an answer that was cancelled before it was begun."""
        pictures = tuple(placed.media.facts for placed in self.prompt.media)
        usage = Usage(
            prompt_tokens=len(self.prompt.token_ids),
            cached_tokens=0,
            completion_tokens=0,
            image_count=len(pictures),
            image_tokens=sum(facts.tokens for facts in pictures),
        )
        seed, ids = self.sampling.seed or 0, self.prompt.token_ids
        return Finished("interrupted", "", usage, self.timings, ids, (), (), seed, pictures)


def request_within(
    context: int,
    prompt: Prompt,
    sampling: SamplingParams,
    timings: Timings | None = None,
    grammar: Grammar | None = None,
    wider: str = "--max-seq-len",
) -> Request:
    """A request whose answer ends where `context` positions do. Raises ContextLengthExceeded.

    wider: what the message calls that which sets `context`.
    """
    positions = len(prompt.token_ids)
    room = context - positions
    if room < 1:
        sizes = [placed.count for placed in prompt.media]
        fitting = words.first_pictures(lambda n: room + sum(sizes[n:]) >= 1, len(sizes))
        raise ContextLengthExceeded(
            f"the prompt has {positions} tokens and the context {context}; "
            f"shorten the prompt or raise {wider}{fitting}"
        )
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    return Request(prompt, sampling, timings=timings or Timings(), grammar=grammar)


class Answer:
    """Events of one answer, in order; whoever steps the engine, one other may take them.

    error: why it ended without Finished. tell: called by whoever steps the engine when something
    came, once until it is taken; it must not wait.
    """

    def __init__(self, request: Request, tell: Callable[[], object] | None = None) -> None:
        self.request = request
        self._tell = tell
        self.finished: Finished | None = None
        self.error: BaseException | None = None
        self._events: deque[Event] = deque()
        self._is_told = False  # waking a reader costs more than a small model's token
        self._cancelled = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come but what waits to be taken."""
        return self.finished is not None or self.error is not None

    @property
    def has_more(self) -> bool:
        """Whether something comes, or waits to be taken."""
        return not self.is_over or bool(self._events)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def take(self) -> list[Event]:
        """The events that came since the last call."""
        self._is_told = False  # first: what comes from now on is told again
        return [self._events.popleft() for _ in range(len(self._events))]

    def add(self, event: Event) -> None:
        self._events.append(event)
        if isinstance(event, Finished):
            self.finished = event
        self._told()

    def fail(self, error: BaseException) -> None:
        """It ends here, and this is why."""
        self.error = error
        self._told()

    def _told(self) -> None:
        if self._tell is not None and not self._is_told:
            self._is_told = True
            try:
                self._tell()
            except Exception:  # as of an event loop that is closed: nobody reads any more
                self._tell = None
                self.cancel()

    def cancel(self) -> None:
        """End it before the next token; safe from any thread."""
        self._cancelled.set()
