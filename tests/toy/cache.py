"""What the toy keeps: keys and values of each slot, and pictures that are encoded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmchat.models.base import Batch, Cache
from mmchat.models.prompt import Prompt
from mmchat.nn.kv_cache import LayerCache
from mmchat.nn.rope import inverse_frequencies
from tests.toy.config import ToyConfig

CAPACITY_STEP = 64  # positions
NOTHING = Prompt(())


class ToyCache:
    """Slots of rows (models.base.Cache), of the dtype and on the device of `like`.

    encoded: embeddings [P, E] by content hash.
    """

    fixed = False

    def __init__(
        self,
        config: ToyConfig,
        slots: int,
        positions: int,
        like: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._config, self._like = config, like
        size = (slots, config.num_key_value_heads, _round_up(positions), config.head_dim)
        options = {"device": like.device, "dtype": dtype or like.dtype}
        self.layers = [LayerCache(*size, **options) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * slots
        self.prompts = [NOTHING] * slots
        self.encoded: dict[str, Tensor] = {}

    def begin(self, slot: int, prompt: Prompt) -> None:
        old = self.rotary_base(slot)
        self.prompts[slot] = prompt
        if self.lengths[slot] and old != self.rotary_base(slot):
            raise ValueError(f"slot {slot} was read with rotary base {old:g}, not {prompt.context}")

    def reserve(self, slot: int, length: int) -> None:
        for layer in self.layers:
            layer.grow(slot, _round_up(length))

    def truncate(self, slot: int, length: int) -> None:
        self.lengths[slot] = min(length, self.lengths[slot])

    def copy(self, source: int, target: int, length: int) -> None:
        self.reserve(target, length)
        for layer in self.layers:
            layer.copy(source, target, length)
        self.prompts[target], self.lengths[target] = self.prompts[source], length

    def shrink(self, slot: int) -> None:
        for layer in self.layers:
            layer.shrink(slot, _round_up(self.lengths[slot]))

    def free(self, slot: int) -> None:
        self.prompts[slot], self.lengths[slot] = NOTHING, 0
        self.shrink(slot)

    def has_media(self, content_hash: str) -> bool:
        return content_hash in self.encoded

    def drop_media(self, content_hash: str) -> None:
        if content_hash not in self._needed():
            self.encoded.pop(content_hash, None)

    def release(self) -> None:
        """Drop pictures whose positions are all read, and room that nothing is stored in."""
        for content_hash in self.encoded.keys() - self._needed():
            del self.encoded[content_hash]
        for slot in range(len(self.lengths)):
            self.shrink(slot)

    def advance(self, batch: Batch) -> None:
        for row in batch.rows():
            self.lengths[row.slot] = row.end

    def rotary_base(self, slot: int) -> float:
        return self._config.rotary_base(len(self.prompts[slot].token_ids))

    def frequencies(self, slot: int) -> Tensor:
        """[D/2]"""
        inv_freq = inverse_frequencies(self._config.head_dim, self.rotary_base(slot))
        return inv_freq.to(self._like.device)

    def pictures(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Where in the batch pictures lie, [K], and their embeddings there, [K, E]."""
        index, parts = [], [self._like.new_empty(0, self._config.hidden_size)]
        for first, part in self._parts(batch):
            index += range(first, first + len(part))
            parts.append(part)
        return (torch.tensor(index, device=self._like.device), torch.cat(parts)) if index else None

    def _parts(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        for row in batch.rows():
            for placed in self.prompts[row.slot].media:
                first, end = max(placed.position, row.start), min(placed.end, row.end)
                if first < end:
                    embeddings = self.encoded[placed.media.content_hash]
                    part = embeddings[first - placed.position : end - placed.position]
                    yield first - row.start + row.offset, part

    def _needed(self) -> set[str]:
        rows = zip(self.prompts, self.lengths, strict=True)
        return {media.content_hash for prompt, length in rows for media in prompt.unread(length)}


def own(cache: Cache) -> ToyCache:
    """The cache as the toy's. Raises TypeError."""
    if not isinstance(cache, ToyCache):
        raise TypeError(f"the toy does not read {type(cache).__name__}")
    return cache


def _round_up(length: int) -> int:
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP
