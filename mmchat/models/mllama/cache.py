"""What Mllama keeps of its rows: keys and values of their text and of their pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mmchat.models.base import Batch, Cache
from mmchat.models.mllama.config import TextConfig
from mmchat.models.mllama.text import SeenRows, SeenSteps
from mmchat.models.prompt import Prompt
from mmchat.nn.attention import KeyValue, Row
from mmchat.nn.kv_cache import LayerCache, PastRows, Spans

CAPACITY_STEP = 256  # positions; seldom enough, for graphs are captured anew when a cache grows
# Positions: a token and the longest draft after it, engine.drafts.LONGEST_DRAFT, which may not be
# imported here.
LONGEST_STEP = 65
ENCODED_IMAGES_KEPT = 4  # beyond those in the text; one of 11B takes up to 210 MB


@dataclass(frozen=True)
class PlacedImage:
    """A picture at a position of the text; `content_hash` finds its keys and values."""

    position: int
    content_hash: str


class MllamaCache:
    """Rows in their slots. Keys and values of a picture hold its valid tiles only.

    encoded: for each picture content, [layer] -> keys and values [1, G, M, D]. It is shared by all
    rows and outlives them, so a picture is encoded once; the least recently used go first.
    fixed: steps compute all slots at once, those without a row for nothing, as a GPU does best.
    """

    def __init__(
        self,
        config: TextConfig,
        slots: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        fixed: bool = False,
    ) -> None:
        self.layers = [
            LayerCache(
                slots,
                config.num_key_value_heads,
                _round_up(capacity),
                config.head_dim,
                fixed=fixed,
                device=device,
                dtype=dtype,
            )
            for _ in config.self_attention_layers
        ]
        self.fixed = fixed
        self.num_cross_layers = len(config.cross_attention_layers)
        self.lengths = [0] * slots
        self.images: list[tuple[PlacedImage, ...]] = [()] * slots
        self.encoded: OrderedDict[str, tuple[KeyValue, ...]] = OrderedDict()
        with torch.inference_mode(False):  # whoever makes it, others write it
            self.positions = torch.zeros(slots, dtype=torch.long, device=device)  # `lengths`
        self._last_groups: tuple[Groups, list[SeenSteps]] = ((), [])

    # ---- rows

    def begin(self, slot: int, prompt: Prompt) -> None:
        self.images[slot] = tuple(
            PlacedImage(placed.position, placed.media.content_hash) for placed in prompt.media
        )
        self._forget_unused()

    def reserve(self, slot: int, length: int) -> None:
        for layer in self.layers:
            layer.grow(slot, _round_up(length))

    def truncate(self, slot: int, length: int) -> None:
        self.lengths[slot] = min(self.lengths[slot], length)
        self.images[slot] = tuple(i for i in self.images[slot] if i.position < length)
        self._lengths_changed()

    def copy(self, source: int, target: int, length: int) -> None:
        self.reserve(target, length)
        for layer in self.layers:
            layer.copy(source, target, length)
        self.lengths[target] = length
        self.images[target] = tuple(i for i in self.images[source] if i.position < length)
        self._lengths_changed()

    def shrink(self, slot: int) -> None:
        for layer in () if self.fixed else self.layers:
            layer.shrink(slot, _round_up(self.lengths[slot]))

    def free(self, slot: int) -> None:
        self.truncate(slot, 0)
        for layer in self.layers:
            if self.fixed:
                layer.clear(slot)
            else:
                layer.shrink(slot, 0)

    def release(self) -> None:
        self._forget_unused(keep=0)
        self._last_groups = ((), [])  # copies of pictures, where several are seen together
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
        if not any(image.content_hash == content_hash for row in self.images for image in row):
            self._forget(content_hash)

    def keep_media(self, content_hash: str, key_values: Sequence[KeyValue]) -> None:
        """Keep a picture's keys and values [1, G, M, D] of each layer, each head's in one piece."""
        self.encoded[content_hash] = tuple((k.contiguous(), v.contiguous()) for k, v in key_values)

    def _forget_unused(self, keep: int = ENCODED_IMAGES_KEPT) -> None:
        """Drop the pictures that are nowhere in the text, but for the `keep` used last."""
        placed = {image.content_hash for row in self.images for image in row}
        unused = [content_hash for content_hash in self.encoded if content_hash not in placed]
        for content_hash in unused[: len(unused) - keep] if keep < len(unused) else ():
            self._forget(content_hash)

    def _forget(self, content_hash: str) -> None:
        self.encoded.pop(content_hash, None)
        if any(content_hash in group for group in self._last_groups[0]):
            self._last_groups = ((), [])  # which holds its keys and values too

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
            and not any(  # in a step all positions of a row see the same pictures
                row.start <= image.position < row.end
                for row in batch.rows()
                for image in self.images[row.slot]
            )
        )

    def past(self, spans: Spans) -> list[PastRows]:
        return [PastRows(layer, spans) for layer in self.layers]

    def seen(self, batch: Batch) -> list[SeenRows]:
        """One for each cross-attention layer; none if no position sees a picture."""
        stretches = list(self._stretches(batch))
        if not stretches:
            return []
        positions = [at for begin, end, _ in stretches for at in range(begin, end)]
        index = None
        if len(positions) < sum(batch.counts):
            index = torch.tensor(positions, device=self.positions.device)
        return [
            SeenRows(
                [Row(end - begin, *self._joined(g, layer)) for begin, end, g in stretches], index
            )
            for layer in range(self.num_cross_layers)
        ]

    def _stretches(self, batch: Batch) -> Iterator[tuple[int, int, Group]]:
        """Of the batch's positions that see pictures: first, end, and which they see."""
        for row in batch.rows():
            shift = row.offset - row.start
            for first, end, images in visible_images(self.images[row.slot], row.end):
                begin = max(first, row.start)
                if begin < end:
                    yield begin + shift, end + shift, _hashes(images)

    def _joined(self, group: Group, layer: int) -> KeyValue:
        """Keys and values of pictures one after the other, [1, G, M, D]; of one, not a copy."""
        pairs = [self.encoded[content_hash][layer] for content_hash in group]
        if len(pairs) == 1:
            return pairs[0]
        key, value = (torch.cat([pair[which] for pair in pairs], dim=2) for which in (0, 1))
        return key, value

    def seen_steps(self, slots: Sequence[int], ends: Sequence[int]) -> list[SeenSteps]:
        """What the last of these rows' positions before `ends` see; none if no row has a picture.

        It is made anew only where the pictures are others, so the tensors stay where they are.
        """
        rows = zip(slots, ends, strict=True)
        groups = tuple(_last_group(visible_images(self.images[slot], end)) for slot, end in rows)
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
            pairs = [self._joined(group, layer) if group else None for group in groups]
            key, value = _pad_rows(pairs, max(sizes))
            steps.append(
                SeenSteps(key, value, None if same else mask, None if min(sizes) else sees)
            )
        return steps


Group = tuple[str, ...]  # content hashes of pictures that are seen together
Groups = tuple[Group, ...]  # of several rows


def own(cache: Cache) -> MllamaCache:
    """The cache as Mllama's. Raises TypeError."""
    if not isinstance(cache, MllamaCache):
        raise TypeError(f"Mllama does not read {type(cache).__name__}")
    return cache


def visible_images(
    images: Sequence[PlacedImage], end: int
) -> list[tuple[int, int, list[PlacedImage]]]:
    """Which pictures each stretch of text before `end` sees: (first position, end, pictures).

    A picture is seen from its own token to the next picture's; pictures at adjacent positions form
    a group, seen together from the last one's token on.
    """
    images = [image for image in images if image.position < end]
    stretches = []
    group: list[PlacedImage] = []
    for i, image in enumerate(images):
        adjacent = bool(group) and group[-1].position + 1 == image.position
        group = [*group, image] if adjacent else [image]
        stop = images[i + 1].position if i + 1 < len(images) else end
        stretches.append((image.position, stop, group))
    return stretches


def _hashes(images: Sequence[PlacedImage]) -> Group:
    return tuple(image.content_hash for image in images)


def _last_group(stretches: Sequence[tuple[int, int, list[PlacedImage]]]) -> Group:
    return _hashes(stretches[-1][2]) if stretches else ()


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


def _round_up(length: int) -> int:
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP
