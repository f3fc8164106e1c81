"""How prompts are read: pictures slice by slice, and tokens of several rows as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mmchat.hardware.allocation import memory_error
from mmchat.models.base import Batch, cache_lacks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.engine.row import Row
    from mmchat.models.base import Cache, Model
    from mmchat.models.prompt import Media, Prompt
    from mmchat.runtime.base import Runtime

Read = Sequence[tuple["Row", "Tensor"]]  # rows, each with the tokens [S] that it reads now


class Encoding:
    """media: what is offered to the model, which takes the first and as many others as it likes;
    once it is begun, what was taken."""

    def __init__(self, media: Sequence[Media]) -> None:
        self.media = media
        self._slices: Iterator[Sequence[Media]] | None = None
        self._is_last_try = False

    def is_for(self, row: Row) -> bool:
        """Whether the row waits for any of these pictures."""
        hashes = {media.content_hash for media in self.media}
        return any(media.content_hash in hashes for media in row.unseen)

    def step(self, runtime: Runtime, cache: Cache, release: Callable[[], object]) -> bool:
        """One slice; whether there are more. Raises what fails twice.

        The second try is the first picture alone, where there were others or memory ran out, which
        `release` may give back.
        """
        out_of_memory = None
        try:
            if self._slices is None:
                self._slices = runtime.encode(self.media, cache)
            taken = next(self._slices, None)
            self.media = taken or self.media
            return taken is not None
        except Exception as error:
            out_of_memory = memory_error(error)
            if self._is_last_try or not (out_of_memory or len(self.media) > 1):
                raise
        if out_of_memory:
            release()
        self.media, self._slices, self._is_last_try = self.media[:1], None, True
        return True


def joinable(ready: Sequence[Row]) -> Sequence[Row]:
    """Those that may be read in one forward: one that is watched is read alone, in its turn."""
    if ready[0].watch:
        return ready[:1]
    return [row for row in ready if not row.watch]


def apart(read: Read) -> list[Read]:
    """Those who write and those who read their prompts, as far as there are such."""
    writing = [one for one in read if one[0].is_writing]
    reading = [one for one in read if not one[0].is_writing]
    return [part for part in (writing, reading) if part]


def joined(read: Read, lengths: Sequence[int]) -> tuple[Batch, list[int]]:
    """The batch, and how many logits each row gets of it. lengths: positions of each slot so far.

    A row that writes gets those of all its tokens; one that reads its prompt those of the last,
    and of tokens before such as are scored.
    """
    import torch

    slots = tuple(row.slot.number for row, _ in read)
    starts = tuple(lengths[slot] for slot in slots)
    counts = tuple(len(tokens) for _, tokens in read)
    wanted: list[int] = []
    of_rows: list[int] = []
    offset, scores = 0, False
    for (row, _), start, count in zip(read, starts, counts, strict=True):
        own = range(count) if row.is_writing else row.scores.wanted(start, start + count)
        wanted += [offset + at for at in own]
        of_rows.append(len(own))
        scores = scores or (len(own) > 1 and not row.is_writing)
        offset += count
    ids = read[0][1] if len(read) == 1 else torch.cat([tokens for _, tokens in read])
    watch = None if read[0][0].is_writing else read[0][0].watch
    return Batch(ids, slots, starts, counts, tuple(wanted), scores, watch), of_rows


# ---- without an engine, for those who compare and measure models


def encode(runtime: Runtime | Model, prompt: Prompt, cache: Cache) -> None:
    """Begin `prompt` in the cache's first slot, and encode the pictures that it needs."""
    cache.begin(0, prompt)
    unread = prompt.unread(cache.lengths[0])
    while lacking := cache_lacks(cache, unread):
        for _ in runtime.encode(lacking, cache):
            pass


def rest_of(prompt: Prompt, cache: Cache, device: torch.device) -> Batch:
    """The positions of `prompt` that the cache's first slot does not hold."""
    import torch

    start = cache.lengths[0]
    return Batch.last_of(torch.tensor(prompt.token_ids[start:], device=device), start)
