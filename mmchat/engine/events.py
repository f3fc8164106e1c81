"""What an answer consists of while it is written; every front end reads these."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmchat.conversation import FinishReason

if TYPE_CHECKING:
    from mmchat.models.prompt import MediaFacts


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token under the model, and of the most probable ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Timings:
    """Seconds spent in each stage of one answer; peak memory in bytes since the process started.

    tokens_per_second counts decoding alone: tokens after the first, by the time they took.
    """

    load_seconds: float = 0.0
    preprocessing_seconds: float = 0.0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    tokens_per_second: float | None = None
    peak_memory_bytes: int = 0
    started: float = field(default_factory=time.perf_counter, repr=False)


@dataclass(frozen=True)
class Usage:
    """Token counts. image_tokens: vision tokens that the text could attend to.

    draft_tokens: guessed and checked, of which accepted_tokens were right.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    image_count: int
    image_tokens: int
    draft_tokens: int = field(default=0, compare=False)  # how it was written, not what
    accepted_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Progress:
    """A step begins: "preprocessing", "vision" or "prefill"."""

    stage: str


@dataclass(frozen=True)
class TextDelta:
    """One more token. Its text may be empty: half a character, or held back for a stop string.

    What was held back to the end comes without a token.
    """

    text: str
    token_id: int | None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Finished:
    """The answer is complete. pictures: one entry for each of the prompt.

    prompt_logprobs: of the tokens of the prompt that were to be scored.
    """

    reason: FinishReason
    text: str
    usage: Usage
    timings: Timings
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    seed: int
    pictures: tuple[MediaFacts, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


Event = Progress | TextDelta | Finished


def read_events(
    events: Iterable[Event],
    on_text: Callable[[TextDelta], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Finished:
    """Hand on the events of an answer as they come, and return the last one."""
    for event in events:
        if isinstance(event, Finished):
            return event
        if isinstance(event, Progress):
            on_progress(event)
        else:
            on_text(event)
    raise RuntimeError("the engine ended without a Finished event")
