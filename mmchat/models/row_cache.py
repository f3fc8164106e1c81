"""What the caches of all families share: keys and values of rows in slots, and kept pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from mmchat.models.base import Batch, Cache
from mmchat.models.prompt import Prompt
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import LayerCache, PastRows, Spans

CAPACITY_STEP = 256  # positions; seldom enough, for graphs are captured anew when a cache grows
# Positions: a token and the longest draft after it, engine.drafts.LONGEST_DRAFT, which may not be
# imported here.
LONGEST_STEP = 65
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Place:
    """Where a prompt has a picture, without its pixels: what is kept of it outlives its request."""

    start: int
    end: int
    content_hash: str


class RowCache(ABC, Generic[Kept]):
    """Rows in their slots, of `dtype` or that of `like`, on its device (models.base.Cache).

    text: the config of the decoder. ranks: how many processes share its heads. places: of the
    pictures of each row's prompt.

    encoded: what is kept of each picture content. It is shared by all rows and outlives them, so a
    picture is encoded once; whoever uses the cache says which go. fixed: steps compute all slots
    at once, those without a row for nothing, as a GPU does best.
    """

    def __init__(
        self,
        text: Any,
        slots: int,
        positions: int,
        like: Tensor,
        *,
        fixed: bool = False,
        ranks: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype or like.dtype
        size = (slots, text.num_key_value_heads // ranks, _round_up(positions), text.head_dim)
        options = {"device": like.device, "dtype": self.dtype}
        layers = range(self.self_attention_layers(text))
        self.layers = [LayerCache(*size, fixed=fixed, **options) for _ in layers]
        self.fixed = fixed
        self.lengths = [0] * slots
        self.encoded: dict[str, Kept] = {}
        self.places: list[tuple[Place, ...]] = [()] * slots
        with torch.inference_mode(False):  # whoever makes it, others write it
            self.positions = torch.zeros(slots, dtype=torch.long, device=like.device)  # `lengths`

    @classmethod
    def of(cls, cache: Cache) -> Self:
        """The cache as one of these. Raises TypeError."""
        if not isinstance(cache, cls):
            raise TypeError(f"this model does not read {type(cache).__name__}")
        return cache

    # ---- what a family says

    @staticmethod
    def self_attention_layers(text: Any) -> int:
        return text.num_hidden_layers

    @abstractmethod
    def _needed(self) -> set[str]:
        """Contents of the pictures that some row may still look at."""

    @abstractmethod
    def beside(self, slots: range) -> tuple[Any, ...]:
        """What a step of these slots is given, tensors that stay where they are."""

    # ---- rows

    def begin(self, slot: int, prompt: Prompt) -> None:
        self.places[slot] = tuple(
            Place(placed.position, placed.end, placed.media.content_hash) for placed in prompt.media
        )

    def reserve(self, slot: int, length: int) -> None:
        for layer in self.layers:
            layer.grow(slot, _round_up(length))

    def truncate(self, slot: int, length: int) -> None:
        self.lengths[slot] = min(self.lengths[slot], length)
        self._lengths_changed()

    def copy(self, source: int, target: int, length: int) -> None:
        self.reserve(target, length)
        for layer in self.layers:
            layer.copy(source, target, length)
        self.lengths[target] = length
        self.places[target] = self.places[source]
        self._lengths_changed()

    def shrink(self, slot: int) -> None:
        for layer in () if self.fixed else self.layers:
            layer.shrink(slot, _round_up(self.lengths[slot]))

    def free(self, slot: int) -> None:
        self.places[slot] = ()
        self.truncate(slot, 0)
        for layer in self.layers:
            if self.fixed:
                layer.clear(slot)
            else:
                layer.shrink(slot, 0)

    def release(self) -> None:
        for content_hash in self.encoded.keys() - self._needed():
            self._forget(content_hash)
        for slot, length in enumerate(self.lengths):
            longest = max(self.lengths) if self.fixed else length
            for layer in self.layers:
                layer.shrink(slot, _round_up(max(longest, 1)))
        if self.positions.is_cuda:
            torch.cuda.empty_cache()

    def short_of(self, batch: Batch) -> list[tuple[int, int]]:
        """(slot, positions) of the rows that a batch has no room for yet."""
        rows = [(row.slot, row.end) for row in batch.rows()]
        if self.fixed and self.is_step(batch):  # what is behind other rows is written too
            rows.append((0, max(self.lengths) + batch.counts[0]))
        # of every layer: where memory ran out, some have grown and others have not
        return [(s, end) for s, end in rows if min(one.capacity(s) for one in self.layers) < end]

    def advance(self, batch: Batch) -> None:
        for row in batch.rows():
            self.lengths[row.slot] = row.end
            self.positions[row.slot] += row.count  # on the device, without waiting for it

    def _lengths_changed(self) -> None:
        self.positions.copy_(torch.tensor(self.lengths))

    # ---- pictures

    def has_media(self, content_hash: str) -> bool:
        return content_hash in self.encoded

    def drop_media(self, content_hash: str) -> None:
        if content_hash not in self._needed():
            self._forget(content_hash)

    def _forget(self, content_hash: str) -> None:
        self.encoded.pop(content_hash, None)

    # ---- what the layers are given

    def is_step(self, batch: Batch) -> bool:
        """Whether a batch is read by static tensors: a next token, or a draft, of one row or,
        in fixed slots, of several."""
        return (
            batch.wants_all
            and not batch.scores
            and not batch.watch
            and len(set(batch.counts)) == 1
            and batch.counts[0] <= LONGEST_STEP
            and min(batch.starts) > 0  # those from 0 are differentiable; steps write in place
            and (self.fixed or len(batch.slots) == 1)
            and not self._has_picture(batch)
        )

    def _has_picture(self, batch: Batch) -> bool:
        """Whether a position of the batch is a picture's."""
        return any(
            row.start < place.end and place.start < row.end
            for row in batch.rows()
            for place in self.places[row.slot]
        )

    def past(self, spans: Spans) -> list[PastRows]:
        return [PastRows(layer, spans) for layer in self.layers]

    def rows(self, slot: int) -> list[KeyValue]:
        """Keys and values [1, G, L, D] of one slot, layer by layer."""
        return [layer.row(slot) for layer in self.layers]

    def in_all_slots(self, batch: Batch) -> Tensor:
        """The tokens of a step in their fixed slots, [slots, S], where there is room for them.

        Slots without a row write behind their length, where nobody reads, and need the room too.
        """
        token_ids = batch.token_ids.view(len(batch.slots), -1)
        every = token_ids.new_zeros(len(self.lengths), token_ids.shape[1])
        for slot, ids in zip(batch.slots, token_ids, strict=True):  # a list of them would be
            every[slot] = ids  # copied to the device, which waits
        return every


def _round_up(length: int) -> int:
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP
