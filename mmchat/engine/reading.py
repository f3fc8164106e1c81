"""How prompts are read: in turns, pictures slice by slice, tokens of several rows as one batch."""

from __future__ import annotations

import sys
from collections import deque
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

# Positions of prompts that are read at once where there are several rows: large enough that
# products of matrices run at full speed, on a CPU and on a device, and small enough that those who
# write or come meanwhile, and whoever cancels, do not wait long.
PIECE, DEVICE_PIECE = 256, 512
SHORT = 64  # positions of a prompt that need not wait for a piece of a longer one


class Turns:
    """Rows that read their prompts; whose turn is next comes first. rows: of all that there are."""

    def __init__(self, rows: int, device: torch.device) -> None:
        piece = PIECE if device.type == "cpu" else DEVICE_PIECE
        self._most = piece if rows > 1 else sys.maxsize  # nobody else can begin meanwhile
        self._rows: deque[Row] = deque()
        self._short_first = False  # whether the last piece was of short prompts before their turn

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def remove(self, row: Row) -> None:
        """It writes, or is over; nothing changes if it has been removed."""
        if row in self._rows:
            self._rows.remove(row)

    def next_pieces(self) -> list[tuple[Row, Tensor]]:
        """Pieces of prompts for one forward; none if it is the turn of one who waits for a picture.

        One that is watched is read alone, in its turn. Every second time the pieces may be of short
        prompts alone, so that these do not wait for a long one of others, nor that one for ever.
        """
        first = self._rows[0] if self._rows else None
        if first is None or first.unencoded():
            return []
        ready = [row for row in self._rows if not (row.watch or row.unencoded())]
        if first.watch:
            ready = [first]
        short = [row for row in ready if row.unread <= SHORT]
        self._short_first = bool(short) and len(short) < len(ready) and not self._short_first
        if self._short_first:  # it is still the turn of who was first
            ready = short
        else:
            self._rows.rotate(-1)
        pieces, left = [], self._most
        for row in ready:
            piece = row.next_piece(left)
            pieces.append((row, piece))
            left -= len(piece)
            if not left:
                break
        return pieces

    def next_pictures(self) -> list[tuple[Row, Media]]:
        """All pictures that are waited for, each with who waits; that was the turn of the first."""
        wanted = [(row, media) for row in self._rows for media in row.unencoded()]
        self._rows.rotate(-1)
        return wanted


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
        return any(media.content_hash in hashes for media in row.unencoded())

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


def apart(read: Read) -> list[Read]:
    """Those who write and those who read their prompts, as far as there are such."""
    writing = [one for one in read if one[0].is_writing]
    reading = [one for one in read if not one[0].is_writing]
    return [part for part in (writing, reading) if part]


def joined(read: Read) -> tuple[Batch, list[int]]:
    """The batch, and how many logits each row gets of it.

    A row that writes gets those of all its tokens; one that reads its prompt those of the last,
    and of tokens before such as are scored.
    """
    import torch

    slots = tuple(row.slot.number for row, _ in read)
    starts = tuple(row.held for row, _ in read)
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
