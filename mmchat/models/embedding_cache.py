"""A cache for families whose pictures take positions: keys and values, and pictures until read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

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
ENCODED_IMAGES_KEPT = 4  # beyond those of open prompts, for a conversation that goes on


@dataclass(frozen=True)
class Place:
    """Where a prompt has a picture, without its pixels: what is kept of it outlives its request."""

    start: int
    end: int
    content_hash: str


class EmbeddingCache:
    """Rows in their slots, of the dtype and on the device of `like` (models.base.Cache).

    encoded: for each picture content, embeddings [count, E] that stand in place of tokens; they are
    shared by all rows, and the least recently used go first once they are read. fixed: steps
    compute all slots at once, those without a row for nothing, as a GPU does best.
    """

    def __init__(
        self,
        *,
        layers: int,
        groups: int,
        head_dim: int,
        slots: int,
        positions: int,
        like: Tensor,
        fixed: bool,
    ) -> None:
        size = (slots, groups, _round_up(positions), head_dim)
        options = {"device": like.device, "dtype": like.dtype}
        self.layers = [LayerCache(*size, fixed=fixed, **options) for _ in range(layers)]
        self.fixed = fixed
        self.lengths = [0] * slots
        self.places: list[tuple[Place, ...]] = [()] * slots  # of the pictures of each prompt
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()
        with torch.inference_mode(False):  # whoever makes it, others write it
            self.positions = torch.zeros(slots, dtype=torch.long, device=like.device)  # `lengths`

    # ---- rows

    def begin(self, slot: int, prompt: Prompt) -> None:
        self.places[slot] = tuple(
            Place(placed.position, placed.end, placed.media.content_hash) for placed in prompt.media
        )
        self._forget_unused(ENCODED_IMAGES_KEPT)

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
        self.places[target], self.lengths[target] = self.places[source], length
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
        self._forget_unused(0)
        for slot, length in enumerate(self.lengths):
            longest = max(self.lengths) if self.fixed else length
            for layer in self.layers:
                layer.shrink(slot, _round_up(max(longest, 1)))
        if self.positions.is_cuda:
            torch.cuda.empty_cache()

    def advance(self, batch: Batch) -> None:
        """The batch has been read."""
        for row in batch.rows():
            self.lengths[row.slot] = row.end
            self.positions[row.slot] += row.count  # on the device, without waiting for it

    def _lengths_changed(self) -> None:
        self.positions.copy_(torch.tensor(self.lengths))

    # ---- pictures

    def has_media(self, content_hash: str) -> bool:
        if content_hash not in self.encoded:
            return False
        self.encoded.move_to_end(content_hash)
        return True

    def drop_media(self, content_hash: str) -> None:
        if content_hash not in self._needed():
            self.encoded.pop(content_hash, None)

    def _forget_unused(self, keep: int) -> None:
        """Drop the pictures that no open prompt will read, but for the `keep` used last."""
        needed = self._needed()
        unused = [content_hash for content_hash in self.encoded if content_hash not in needed]
        for content_hash in unused[: max(len(unused) - keep, 0)]:
            del self.encoded[content_hash]

    def _needed(self) -> set[str]:
        rows = zip(self.places, self.lengths, strict=True)
        return {p.content_hash for places, length in rows for p in places if p.end > length}

    def pictures(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Where in the batch pictures lie, [K], and their embeddings there, [K, E].

        A batch may begin and end inside of a picture.
        """
        index: list[int] = []
        parts: list[Tensor] = []
        for first, part in self._parts(batch):
            index += range(first, first + len(part))
            parts.append(part)
        if not index:
            return None
        return torch.tensor(index, device=self.positions.device), torch.cat(parts)

    def _parts(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        for row in batch.rows():
            for place in self.places[row.slot]:
                first, end = max(place.start, row.start), min(place.end, row.end)
                if first < end:
                    embeddings = self.encoded[place.content_hash]
                    part = embeddings[first - place.start : end - place.start]
                    yield first - row.start + row.offset, part

    # ---- what the layers are given

    def is_step(self, batch: Batch) -> bool:
        """Whether a batch is read by static tensors: a next token, or a draft, of one row or,
        in fixed slots, of several."""
        return (
            batch.wants_all
            and not batch.scores
            and len(set(batch.counts)) == 1
            and batch.counts[0] <= LONGEST_STEP
            and min(batch.starts) > 0  # those from 0 are differentiable; steps write in place
            and (self.fixed or len(batch.slots) == 1)
            and not any(True for _ in self._parts(batch))
        )

    def past(self, spans: Spans) -> list[PastRows]:
        return [PastRows(layer, spans) for layer in self.layers]

    def rows(self, slot: int) -> list[KeyValue]:
        """Keys and values [1, G, L, D] of one slot, layer by layer."""
        return [layer.row(slot) for layer in self.layers]


def own(cache: Cache) -> EmbeddingCache:
    """The cache as this one. Raises TypeError."""
    if not isinstance(cache, EmbeddingCache):
        raise TypeError(f"this model does not read {type(cache).__name__}")
    return cache


def _round_up(length: int) -> int:
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP
