"""Tokens of several rows as one batch for the model, and which of its logits are whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmchat.models.base import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.engine.row import Row

Read = Sequence[tuple["Row", "Tensor"]]  # rows, each with the tokens [S] that it reads now


def joinable(ready: Sequence[Row]) -> Sequence[Row]:
    """Those that may be read in one forward: one that is watched is read alone, in its turn."""
    if ready[0].watch:
        return ready[:1]
    return [row for row in ready if not row.watch]


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
