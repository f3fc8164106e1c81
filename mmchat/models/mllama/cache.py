"""What Mllama keeps of a conversation: keys and values of text and of pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmchat.models.mllama.config import TextConfig
from mmchat.models.mllama.text import CrossSegment, KeyValue, gather_images
from mmchat.nn.kv_cache import LayerCache

CAPACITY_STEP = 256  # positions
ENCODED_IMAGES_KEPT = 4  # beyond those in the text; one of 11B takes up to 210 MB


@dataclass(frozen=True)
class PlacedImage:
    """A picture at a position of the text; `content_hash` finds its keys and values."""

    position: int
    content_hash: str


@dataclass(frozen=True)
class DecodeImages:
    """What decoding reads of each row's last group of pictures; fields as in TextModel.step."""

    key_values: tuple[KeyValue, ...]
    mask: Tensor | None
    sees_images: Tensor | None


class MllamaCache:
    """Cache of a batch. Keys and values of a picture hold its valid tiles only.

    encoded: for each picture content, [layer] -> keys and values [G, N, D]. It outlives `truncate`
    and `reset`, so a picture is encoded once in a conversation; the least recently used go first.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.batch = batch
        self.layers = [
            LayerCache(
                batch,
                config.num_key_value_heads,
                _round_up(capacity),
                config.head_dim,
                device=device,
                dtype=dtype,
            )
            for _ in config.self_attention_layers
        ]
        self.num_cross_layers = len(config.cross_attention_layers)
        self.lengths = [0] * batch
        self.images: list[list[PlacedImage]] = [[] for _ in range(batch)]
        self.encoded: OrderedDict[str, tuple[KeyValue, ...]] = OrderedDict()
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self._decode_images: DecodeImages | None = None
        self._decode_images_ready = False

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def capacity(self) -> int:
        return self.layers[0].capacity

    def reserve(self, length: int) -> None:
        for layer in self.layers:
            layer.grow(_round_up(length))

    def truncate(self, length: int) -> None:
        self.lengths = [min(n, length) for n in self.lengths]
        kept = [[i for i in row if i.position < length] for row in self.images]
        if kept != self.images:
            self.images, self._decode_images_ready = kept, False
        self._lengths_changed()

    def reset(self) -> None:
        self.truncate(0)

    def release(self) -> None:
        self._forget_unused(keep=0)
        if not self._decode_images_ready:
            self._decode_images = None
        for layer in self.layers:
            layer.shrink(_round_up(max(self.length, 1)))
        if self.positions.is_cuda:
            torch.cuda.empty_cache()

    def advance(self, counts: Sequence[int]) -> None:
        """Add counts[row] positions to each row after a prefill."""
        self.lengths = [n + new for n, new in zip(self.lengths, counts, strict=True)]
        self._lengths_changed()
        self._forget_unused()

    def advance_all(self, count: int) -> None:
        """Add `count` positions to each row, on the device too, without waiting for it."""
        self.lengths = [n + count for n in self.lengths]
        self.positions += count

    def _lengths_changed(self) -> None:
        self.positions.copy_(torch.tensor(self.lengths))

    def add_encoded(self, content_hash: str, key_values: Sequence[KeyValue]) -> None:
        """Keep a picture's keys and values [G, N, D] of each layer, each head's in one piece."""
        self.encoded[content_hash] = tuple((k.contiguous(), v.contiguous()) for k, v in key_values)

    def _forget_unused(self, keep: int = ENCODED_IMAGES_KEPT) -> None:
        """Drop the pictures that are nowhere in the text, but for the `keep` used last."""
        placed = {image.content_hash for row in self.images for image in row}
        unused = [content_hash for content_hash in self.encoded if content_hash not in placed]
        for content_hash in unused[: len(unused) - keep] if keep < len(unused) else ():
            del self.encoded[content_hash]

    def place(self, row: int, images: Sequence[PlacedImage]) -> None:
        self.images[row].extend(images)
        self._decode_images_ready = False

    def segments(
        self, start: int, counts: Sequence[int]
    ) -> tuple[list[CrossSegment], list[tuple[KeyValue, ...]]]:
        """Segments of the new positions start .. start + counts[row], relative to `start`.

        Second value: for each cross-attention layer the keys and values that they index.
        """
        order = list(dict.fromkeys(i.content_hash for row in self.images for i in row))
        index = {content_hash: i for i, content_hash in enumerate(order)}
        segments = []
        for row, count in enumerate(counts):
            for first, last, seen in visible_images(self.images[row], start + count):
                if last > start:
                    images = tuple(index[image.content_hash] for image in seen)
                    begin = max(first - start, 0)
                    segments.append(CrossSegment((row,), begin, last - start, (images,)))
        return segments, self._layers_of(order)

    def _layers_of(self, order: Sequence[str]) -> list[tuple[KeyValue, ...]]:
        return [
            tuple(self.encoded[content_hash][layer] for content_hash in order)
            for layer in range(self.num_cross_layers)
        ]

    def decode_images(self) -> DecodeImages | None:
        """What each row's next token sees; None if no row has a picture."""
        if not self._decode_images_ready:
            self._decode_images = self._gather_decode_images()
            self._decode_images_ready = True
        return self._decode_images

    def _gather_decode_images(self) -> DecodeImages | None:
        groups = [_last_group(row) for row in self.images]
        if not any(groups):
            return None
        rows = [tuple(image.content_hash for image in group) for group in groups]
        sizes = [sum(self.encoded[h][0][0].shape[1] for h in row) for row in rows]
        layers = []
        for layer in range(self.num_cross_layers):
            pairs = []
            for row in rows:
                kept = [self.encoded[h][layer] for h in row]
                pairs.append(gather_images([range(len(kept))], kept) if kept else None)
            layers.append(_pad_rows(pairs, max(sizes)))
        device = self.positions.device
        limits = torch.tensor(sizes, device=device)[:, None, None, None]
        columns = torch.arange(max(sizes), device=device)
        sees = (limits > 0)[..., 0]
        mask = (columns < limits) | ~sees[..., None]  # rows without pictures: open, result unused
        same = len(set(sizes)) == 1
        return DecodeImages(tuple(layers), None if same else mask, None if min(sizes) else sees)


def visible_images(
    images: Sequence[PlacedImage], end: int
) -> list[tuple[int, int, list[PlacedImage]]]:
    """Which pictures each stretch of text sees: (first position, end, pictures).

    A picture is seen from its own token to the next picture's; pictures at adjacent positions form
    a group, seen together from the last one's token on.
    """
    stretches = []
    group: list[PlacedImage] = []
    for i, image in enumerate(images):
        adjacent = bool(group) and group[-1].position + 1 == image.position
        group = [*group, image] if adjacent else [image]
        stop = images[i + 1].position if i + 1 < len(images) else end
        stretches.append((image.position, stop, group))
    return stretches


def _last_group(images: Sequence[PlacedImage]) -> list[PlacedImage]:
    stretches = visible_images(images, 0)
    return stretches[-1][2] if stretches else []


def _pad_rows(pairs: Sequence[KeyValue | None], size: int) -> KeyValue:
    """Stack rows [1, G, n, D] to [B, G, size, D], padded with zeros; None is a row of zeros."""
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


def _round_up(length: int) -> int:
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP
