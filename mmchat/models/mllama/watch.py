"""What text reads of its pictures, taken out while a prompt is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmchat.models.base import Batch, Watch
from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.mllama.text import CrossAttentionLayer, SeenRows
from mmchat.nn.attention import attention_weights

# Positions whose weights are computed at once: with 4 tiles and 64 heads 26 MB.
_AT_ONCE = 16


class _Stretch(NamedTuple):
    """Positions that see the same pictures. first: of the prompt; places: of these pictures."""

    first: int
    places: tuple[int, ...]


class WatchedRows(SeenRows):
    """`SeenRows` that tell `watch` what share of its reading each position gives each vision token.

    share: what this layer counts among all; the first of them begins anew, as a forward may run
    again where memory was short.
    """

    def __init__(
        self,
        seen: SeenRows,
        stretches: Sequence[_Stretch],
        watch: Watch,
        share: float,
        is_first: bool,
    ) -> None:
        super().__init__(seen.stretches, seen.index)
        self._watched, self._watch = stretches, watch
        self._share, self._is_first = share, is_first

    def attend(self, query: Tensor) -> Tensor:
        offset = 0
        for stretch, row in zip(self._watched, self.stretches, strict=True):
            skipped = max(0, self._watch.first - stretch.first)
            for at in range(skipped, row.queries, _AT_ONCE):
                end = min(at + _AT_ONCE, row.queries)
                weights = attention_weights(query[offset + at : offset + end], row.key[0])
                weights = (self._share * weights).cpu()  # once for all of them
                for position, shares in enumerate(weights, start=stretch.first + at):
                    self._add(position, stretch.places, shares)
            offset += row.queries
        return super().attend(query)

    def _add(self, position: int, places: tuple[int, ...], shares: Tensor) -> None:
        if not self._is_first:
            shares = shares + self._watch.read[position][1]
        self._watch.read[position] = places, shares


def watched(
    seen: Sequence[SeenRows],
    batch: Batch,
    cache: MllamaCache,
    layers: Sequence[CrossAttentionLayer],
) -> Sequence[SeenRows]:
    """`seen`, and the batch's watch is told, if it has one. layers: those that read pictures.

    A layer counts as much as its gate lets through.
    """
    if batch.watch is None or not seen:
        return seen
    [row] = batch.rows()
    stretches = [
        _Stretch(row.start + begin - row.offset, tuple(image.start for image in images))
        for begin, _, images in cache.stretches(batch)
    ]
    gates = [abs(float(layer.cross_attn_attn_gate.detach().tanh())) for layer in layers]
    total = sum(gates)
    shares = [gate / total if total else 1 / len(gates) for gate in gates]
    return [
        WatchedRows(one, stretches, batch.watch, share, layer == 0)
        for layer, (one, share) in enumerate(zip(seen, shares, strict=True))
    ]
