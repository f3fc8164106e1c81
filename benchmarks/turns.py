"""Two turns of a chat about a picture file, as a person has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.clock import Elapsed, Rounds, Stopwatch
from benchmarks.contestants import tiled
from mmchat.bench.pictures import picture_of
from mmchat.bench.rounds import interleave
from mmchat.chat.session import ChatSession
from mmchat.images import load_image

if TYPE_CHECKING:
    from benchmarks.contestants import Mmchat

QUESTIONS = ("What's in this image?", "What colours does it have?")
# What Llama's tokenizer has as one token each, of the questions and of what surrounds them: as many
# tokens are read as of the real model.
WORDS = (
    "What", "'s", " in", " this", " image", " colours", " does", " it", " have",
    "user", "assistant", "\n\n",
)  # fmt: skip


def measure_turns(
    contestants: Sequence[Mmchat], tiles: int, *, rounds: int, seconds: float
) -> Rounds:
    """Time from the bytes of a picture to the first token, and in a second turn about it.

    Stages: "preprocessing" (bytes to tiles), "first turn" (all of it) and "second turn".
    """
    runs = {c.name: lambda i, c=c: two_turns(c, tiles, seed=100 + i) for c in contestants}
    return Rounds(interleave(runs, rounds=rounds, seconds=seconds))


def two_turns(contestant: Mmchat, tiles: int, seed: int) -> Mapping[str, Elapsed]:
    """One conversation about a picture that was never seen before."""
    loaded = contestant.loaded
    clock = Stopwatch(loaded.device)
    other = picture_of(loaded.spec, tiles, seed + 10_000)
    _, preprocessing = clock.time(lambda: tiled(loaded.processor, load_image(other)))
    session = ChatSession(loaded)
    sampling = replace(loaded.sampling_defaults, temperature=0.0, max_new_tokens=1)
    pictures = [picture_of(loaded.spec, tiles, seed)]
    _, first = clock.time(lambda: list(session.send(QUESTIONS[0], pictures, sampling)))
    _, second = clock.time(lambda: list(session.send(QUESTIONS[1], (), sampling)))
    return {"preprocessing": preprocessing, "first turn": first, "second turn": second}
