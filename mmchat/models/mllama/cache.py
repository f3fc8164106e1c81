"""What Mllama keeps of its rows: keys and values of their text and of their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmchat.models.base import Batch
from mmchat.models.mllama.config import TextConfig
from mmchat.models.mllama.text import SeenRows, SeenSteps
from mmchat.models.row_cache import Place, RowCache
from mmchat.nn.attention import KeyValue, Row, held


class MllamaCache(RowCache[tuple[KeyValue, ...]]):
    """encoded: [layer] -> keys and values [1, G, M, D] of a picture's valid tiles."""

    def __init__(self, text: TextConfig, slots: int, *sizes: Any, **how: Any) -> None:
        super().__init__(text, slots, *sizes, **how)
        self.num_cross_layers = len(text.cross_attention_layers)
        self._last_groups: tuple[Groups, list[SeenSteps]] = ((), [])

    @staticmethod
    def self_attention_layers(text: TextConfig) -> int:
        return len(text.self_attention_layers)

    def truncate(self, slot: int, length: int) -> None:
        self.places[slot] = tuple(i for i in self.places[slot] if i.start < length)
        super().truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        super().copy(source, target, length)
        self.places[target] = tuple(i for i in self.places[source] if i.start < length)

    def release(self) -> None:
        self._last_groups = ((), [])  # copies of pictures, where several are seen together
        super().release()

    def keep_media(self, content_hash: str, key_values: Sequence[KeyValue]) -> None:
        """Keep a picture's keys and values [1, G, M, D] of each layer, each head's in one piece."""
        self.encoded[content_hash] = tuple(
            (held(k, self.dtype).contiguous(), held(v, self.dtype).contiguous())
            for k, v in key_values
        )

    def _needed(self) -> set[str]:
        return {image.content_hash for row in self.places for image in row}

    def _forget(self, content_hash: str) -> None:
        super()._forget(content_hash)
        if any(content_hash in group for group in self._last_groups[0]):
            self._last_groups = ((), [])  # which holds its keys and values too

    def seen(self, batch: Batch) -> list[SeenRows]:
        """One for each cross-attention layer; none if no position sees a picture."""
        stretches = list(self.stretches(batch))
        if not stretches:
            return []
        positions = [at for begin, end, _ in stretches for at in range(begin, end)]
        index = None
        if len(positions) < sum(batch.counts):
            index = torch.tensor(positions, device=self.positions.device)
        return [
            SeenRows(
                [Row(e - b, *self.joined(hashes(seen), layer)) for b, e, seen in stretches], index
            )
            for layer in range(self.num_cross_layers)
        ]

    def stretches(self, batch: Batch) -> Iterator[tuple[int, int, list[Place]]]:
        """Of the batch's positions that see pictures: first, end, and which they see."""
        for row in batch.rows():
            shift = row.offset - row.start
            for first, end, images in visible_images(self.places[row.slot], row.end):
                begin = max(first, row.start)
                if begin < end:
                    yield begin + shift, end + shift, images

    def joined(self, group: Group, layer: int) -> KeyValue:
        """Keys and values of pictures one after the other, [1, G, M, D]; of one, not a copy."""
        pairs = [self.encoded[content_hash][layer] for content_hash in group]
        if len(pairs) == 1:
            return pairs[0]
        key, value = (torch.cat([pair[which] for pair in pairs], dim=2) for which in (0, 1))
        return key, value

    def beside(self, slots: range) -> tuple[list[SeenSteps]]:
        return (self.seen_steps(slots, [self.lengths[slot] for slot in slots]),)

    def seen_steps(self, slots: Sequence[int], ends: Sequence[int]) -> list[SeenSteps]:
        """What the last of these rows' positions before `ends` see; none if no row has a picture.

        It is made anew only where the pictures are others, so the tensors stay where they are.
        """
        rows = zip(slots, ends, strict=True)
        groups = tuple(_last_group(visible_images(self.places[slot], end)) for slot, end in rows)
        if groups != self._last_groups[0]:
            self._last_groups = ((), [])  # before the next is made
            self._last_groups = groups, self._gather(groups)
        return self._last_groups[1]

    def _gather(self, groups: Groups) -> list[SeenSteps]:
        if not any(groups):
            return []
        sizes = [sum(self.encoded[h][0][0].shape[2] for h in group) for group in groups]
        device = self.positions.device
        limits = torch.tensor(sizes, device=device)[:, None, None, None]
        sees = (limits > 0)[..., 0]
        # rows without pictures: open, their result is defined and not used
        mask = (torch.arange(max(sizes), device=device) < limits) | ~sees[..., None]
        same = len(set(sizes)) == 1
        steps = []
        for layer in range(self.num_cross_layers):
            pairs = [self.joined(group, layer) if group else None for group in groups]
            key, value = _pad_rows(pairs, max(sizes))
            steps.append(
                SeenSteps(key, value, None if same else mask, None if min(sizes) else sees)
            )
        return steps


Group = tuple[str, ...]  # content hashes of pictures that are seen together
Groups = tuple[Group, ...]  # of several rows


def visible_images(images: Sequence[Place], end: int) -> list[tuple[int, int, list[Place]]]:
    """Which pictures each stretch of text before `end` sees: (first position, end, pictures).

    A picture is seen from its own token to the next picture's; pictures at adjacent positions form
    a group, seen together from the last one's token on.
    """
    images = [image for image in images if image.start < end]
    stretches = []
    group: list[Place] = []
    for i, image in enumerate(images):
        adjacent = bool(group) and group[-1].start + 1 == image.start
        group = [*group, image] if adjacent else [image]
        stop = images[i + 1].start if i + 1 < len(images) else end
        stretches.append((image.start, stop, group))
    return stretches


def hashes(images: Sequence[Place]) -> Group:
    return tuple(image.content_hash for image in images)


def _last_group(stretches: Sequence[tuple[int, int, list[Place]]]) -> Group:
    return hashes(stretches[-1][2]) if stretches else ()


def _pad_rows(pairs: Sequence[KeyValue | None], size: int) -> KeyValue:
    """Stack rows [1, G, m, D] to [R, G, size, D], padded with zeros; None is a row of zeros."""
    if len(pairs) == 1 and pairs[0] is not None:
        return pairs[0]
    like = next(pair for pair in pairs if pair is not None)[0]
    out = []
    for which in (0, 1):
        stacked = like.new_zeros(len(pairs), like.shape[1], size, like.shape[3])
        for row, pair in enumerate(pairs):
            if pair is not None:
                stacked[row, :, : pair[which].shape[2]] = pair[which][0]
        out.append(stacked)
    return out[0], out[1]
