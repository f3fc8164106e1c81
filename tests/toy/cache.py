"""What the toy keeps: keys and values of each slot, and pictures that are encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmchat.models.prompt import Prompt
from mmchat.nn.attention import attend
from tests.toy._base import Batch
from tests.toy.config import ToyConfig

NOTHING = Prompt(())


@dataclass(frozen=True)
class PastRow:
    """One layer's past of one row: stored [2, L, G, D], of which `start` positions are read."""

    stored: Tensor
    start: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count, read = len(query), self.start + len(query)
        self.stored[0, self.start : read] = key.detach()
        self.stored[1, self.start : read] = value.detach()
        if self.start:
            key, value = self.stored[:, :read].unbind()
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        if self.start == 0:
            attended = attend(query, key, value, causal=True)
        else:
            columns = torch.arange(read, device=key.device)
            mask = columns <= columns[self.start :, None]
            attended = attend(query, key, value, mask=None if count == 1 else mask[None, None])
        return attended[0].transpose(0, 1)


@dataclass(frozen=True)
class PastRows:
    """One layer's past of several rows, of counts[row] new positions each."""

    rows: Sequence[PastRow]
    counts: tuple[int, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store key and value [N, G, D]; query [N, H, D] sees them and the past: [N, H, D]."""
        parts = zip(*(x.split(self.counts) for x in (query, key, value)), strict=True)
        return torch.cat([row.attend(*part) for row, part in zip(self.rows, parts, strict=True)])


class ToyCache:
    """Slots of rows (models.base.Cache), of the dtype and on the device of `like`.

    encoded: embeddings [P, E] by content hash.
    """

    def __init__(self, config: ToyConfig, slots: int, positions: int, like: Tensor) -> None:
        self._config = config
        heads = (config.num_key_value_heads, config.head_dim)
        self._empty = like.new_empty(config.num_hidden_layers, 2, 0, *heads)
        self._stored = [self._empty] * slots  # [layer, 2, L, G, D]
        self.lengths = [0] * slots
        self.prompts = [NOTHING] * slots
        self.encoded: dict[str, Tensor] = {}
        for slot in range(slots):
            self.reserve(slot, positions)

    def open(self, slot: int, prompt: Prompt) -> None:
        kept = self.prompts[slot].context if self.lengths[slot] else prompt.context
        if kept != prompt.context:
            raise ValueError(f"slot {slot} was read with {kept}, the prompt has {prompt.context}")
        self.prompts[slot] = prompt

    def reserve(self, slot: int, length: int) -> None:
        if length > self._stored[slot].shape[2]:
            self._resize(slot, length)

    def truncate(self, slot: int, length: int) -> None:
        self.lengths[slot] = min(length, self.lengths[slot])

    def copy(self, source: int, target: int, length: int) -> None:
        self.free(target)
        self._resize(target, length)
        self._stored[target].copy_(self._stored[source][:, :, :length])
        self.prompts[target], self.lengths[target] = self.prompts[source], length

    def free(self, slot: int) -> None:
        self._stored[slot], self.prompts[slot], self.lengths[slot] = self._empty, NOTHING, 0

    def has_media(self, content_hash: str) -> bool:
        return content_hash in self.encoded

    def drop_media(self, content_hash: str) -> None:
        self.encoded.pop(content_hash, None)

    def release(self) -> None:
        """Drop pictures whose positions are all read, and room that nothing is stored in."""
        unread = {
            placed.media.content_hash
            for prompt, length in zip(self.prompts, self.lengths, strict=True)
            for placed in prompt.media
            if placed.position + placed.count > length
        }
        self.encoded = {mark: kept for mark, kept in self.encoded.items() if mark in unread}
        for slot, length in enumerate(self.lengths):
            self._resize(slot, length)

    def rotary_base(self, slot: int) -> float:
        return self._config.rotary_base(len(self.prompts[slot].token_ids))

    def past(self, layer: int, batch: Batch) -> PastRows:
        rows = zip(batch.slots, batch.starts, strict=True)
        return PastRows([PastRow(self._stored[s][layer], at) for s, at in rows], batch.counts)

    def pictures(self, slot: int, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """Pictures that lie in a piece of a row: where in it, and what of them, [p, E]."""
        for placed in self.prompts[slot].media:
            first = max(placed.position, start)
            last = min(placed.position + placed.count, start + count)
            if first < last:
                embeddings = self.encoded[placed.media.content_hash]
                yield first - start, embeddings[first - placed.position : last - placed.position]

    @torch.inference_mode(False)  # written with gradients and without
    def _resize(self, slot: int, length: int) -> None:
        old = self._stored[slot]
        shape = (*old.shape[:2], length, *old.shape[3:])
        self._stored[slot] = old.new_zeros(shape)
        kept = min(length, old.shape[2])
        self._stored[slot][:, :, :kept] = old[:, :, :kept]
