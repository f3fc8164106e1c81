"""A cache for families whose pictures take positions: keys and values, and pictures until read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmchat.models.base import Batch
from mmchat.models.row_cache import RowCache


class EmbeddingCache(RowCache[Tensor]):
    """encoded: embeddings [count, E] that stand in place of tokens, until these are read.

    of_rows: tensors [slots, ...] that tokens of a slot are read with, which stay where they are.
    """

    of_rows: tuple[Tensor, ...] = ()

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
