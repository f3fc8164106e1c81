"""Mllama as programs of tensors, to be compiled ahead of time, and the model that calls them.

Programs (B = 1; for each self-attention layer `cached` holds a key and a value tensor
[1, G, L, D], for each cross-attention layer `cross` one pair [1, G, M, D]):

    vision        tiles [1, T, C, S, S], aspect_ratio_id [1]                    -> cross, M = T·P
    vision_full   the same for pictures that fill every tile
    prefill       ids [1, S], position [1], length [N], wanted [R], visible [S, 2], cached, cross
                                                                               -> logits [1, R, V]
    prefill_text  the same without visible and cross: no picture is seen
    decode        id [1, 1], position [1], cached, cross                        -> logits [1, V]
    decode_text   the same without cross

position: where the new positions begin. length: any tensor as long as the text will be. wanted: the
new positions whose logits are returned. visible: the first and the end of the vision tokens that
each new position sees, of all pictures joined in `cross`. S, N, R, M and T below the full count are
dynamic; `cached` is written in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import Dim

from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.models.base import Batch, Cache, ExportLimits, ExportProgram, RunProgram
from mmchat.models.mllama.cache import MllamaCache, hashes, visible_images
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.export_parts import Examples, Program, Vision, capacity, pairs
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.text import SeenSteps
from mmchat.models.prompt import Media
from mmchat.models.row_cache import Place

# The programs


class _Prefill(Program):
    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        length: Tensor,
        wanted: Tensor,
        visible: Tensor,
        cached: list[Tensor],
        cross: list[Tensor],
    ) -> Tensor:
        columns = torch.arange(cross[0].shape[2], device=visible.device)
        first, end = visible[:, :1], visible[:, 1:]
        sees = first < end  # rows that see nothing are open: their result is defined, and not used
        mask = ((columns >= first) & (columns < end) | ~sees)[None, None]
        seen = [SeenSteps(key, value, mask, sees[None]) for key, value in pairs(cross)]
        return self.model.step(input_ids, position, pairs(cached), seen, length.shape[0], wanted)[
            None
        ]


class _PrefillText(Program):
    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        length: Tensor,
        wanted: Tensor,
        cached: list[Tensor],
    ) -> Tensor:
        past = pairs(cached)
        return self.model.step(input_ids, position, past, (), length.shape[0], wanted)[None]


class _Decode(Program):
    def forward(
        self,
        token_id: Tensor,
        position: Tensor,
        cached: list[Tensor],
        cross: Sequence[Tensor] = (),
    ) -> Tensor:
        seen = [SeenSteps(key, value, None, None) for key, value in pairs(cross)]
        return self.model.step(token_id, position, pairs(cached), seen)


def export_programs(
    model: MllamaForConditionalGeneration, limits: ExportLimits
) -> list[ExportProgram]:
    """The programs of `model`, with example arguments on its device and in its dtype."""
    vision = model.config.vision_config
    examples = Examples(model)
    ids, tiles = examples.ids, examples.tiles
    cached, cross = examples.cached(capacity(limits.max_seq_len)), examples.cross()
    # From 2 on: torch takes sizes of 1 for constants, and a single position is `decode`.
    new = Dim("new_positions", min=2, max=limits.max_seq_len)
    past = Dim("all_positions", min=2, max=limits.max_seq_len)
    rows = Dim("wanted", min=1, max=limits.max_seq_len)
    seen = examples.vision_tokens(limits)
    some = Dim("tiles", min=1, max=vision.max_num_tiles - 1)
    read = (ids(1, 2, 3)[None], ids(4), ids(*range(7)), ids(1, 2))
    read_dims = ({1: new}, None, {0: past}, {0: rows})
    step = (ids(1)[None], ids(4))
    cross_dims = [{2: seen} for _ in cross]
    no_dims = [None for _ in cached]
    full = ids(vision.aspect_ratios.index((1, vision.max_num_tiles)) + 1)
    spans = ids(0, 0, 0, 9, 0, 9).view(3, 2)
    programs = [
        ("vision", Vision(model), (tiles(2), ids(2)), ({1: some}, None)),
        ("vision_full", Vision(model), (tiles(vision.max_num_tiles), full), None),
        (
            "prefill",
            _Prefill(model),
            (*read, spans, cached, cross),
            (*read_dims, {0: new}, no_dims, cross_dims),
        ),
        ("prefill_text", _PrefillText(model), (*read, cached), (*read_dims, no_dims)),
        ("decode", _Decode(model), (*step, cached, cross), (None, None, no_dims, cross_dims)),
        ("decode_text", _Decode(model), (*step, cached), None),
    ]
    return [ExportProgram(*program) for program in programs]


# The model that calls them


class ExportedModel:
    """Mllama whose math is in programs: run(name, tensors) -> tensors. One row at a time.

    weights: what the programs read, by the model's own names; empty where they hold them.
    """

    def __init__(
        self,
        config: MllamaConfig,
        limits: ExportLimits,
        device: torch.device,
        dtype: torch.dtype,
        run: RunProgram,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.limits = config, limits
        self.weights = weights or {}
        self.device, self.dtype = device, dtype
        self._run = run

    def new_cache(self, slots: int, positions: int) -> MllamaCache:
        """An empty cache of the size that the programs take."""
        if slots != 1:
            raise ExportError(f"an exported model reads one conversation at a time, not {slots}")
        room = self._capacity(positions)
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        return MllamaCache(self.config.text_config, 1, room, like)

    def _capacity(self, _wanted: int) -> int:
        return capacity(self.limits.max_seq_len)

    @torch.inference_mode()
    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        """Put the first picture into the cache, in one go: the programs take one."""
        yield media[:1]
        tiles, ratio = media[0].tensors
        tiles, ratio = tiles[None].to(self.device, self.dtype), ratio.to(self.device)
        out = self._run(self._vision_program(tiles.shape[1]), (tiles, ratio))
        MllamaCache.of(cache).keep_media(media[0].content_hash, pairs(out))

    def _vision_program(self, num_tiles: int) -> str:
        is_full = num_tiles == self.config.vision_config.max_num_tiles
        return "vision_full" if is_full else "vision"

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Read new positions of a row; float32 logits [W, V] of the wanted ones."""
        [row] = batch.rows()
        self._check_room(row.end)
        batch.check(cache.lengths)
        return self._forward(batch, MllamaCache.of(cache))

    def _forward(self, batch: Batch, cache: MllamaCache) -> Tensor:
        cache.reserve(0, capacity(self.limits.max_seq_len))  # `release` may have taken some
        reads = self._decode if batch.counts == (1,) else self._read
        logits = reads(batch, cache)
        cache.advance(batch)
        return logits

    def _decode(self, batch: Batch, cache: MllamaCache) -> Tensor:
        """Logits [1, V] of one new position."""
        seen = cache.seen_steps((0,), (batch.starts[0] + 1,))
        cross = [tensor for layer in seen for tensor in (layer.key, layer.value)]
        name = "decode" if seen else "decode_text"
        ids = batch.token_ids[None].to(self.device)
        return self._run(name, [ids, cache.positions, *self._cached(cache), *cross])[0]

    def _read(self, batch: Batch, cache: MllamaCache) -> Tensor:
        """Logits [W, V] of several new positions."""
        [start], [count] = batch.starts, batch.counts
        seen, visible = self._visible(cache, start, count)
        cross = self._joined(cache, seen)
        length = torch.empty(start + count, dtype=torch.long)
        wanted = torch.tensor(batch.wanted)
        arguments = [batch.token_ids[None], cache.positions, length, wanted]
        arguments += [visible] if cross else []
        arguments = [tensor.to(self.device) for tensor in arguments]
        name = "prefill" if cross else "prefill_text"
        return self._run(name, [*arguments, *self._cached(cache), *cross])[0][0]

    def _cached(self, cache: MllamaCache) -> list[Tensor]:
        return [tensor for layer in cache.layers for tensor in layer.row(0)]

    def _check_room(self, length: int) -> None:
        if length > self.limits.max_seq_len:
            raise ContextLengthExceeded(
                f"{length} positions are needed and the model was exported for"
                f" {self.limits.max_seq_len}; export it again with a larger --max-seq-len"
            )

    def _visible(self, cache: MllamaCache, start: int, count: int) -> tuple[list[Place], Tensor]:
        """The pictures that new positions see, and for each position its span of their tokens."""
        seen: list[Place] = []
        group: list[Place] = []
        visible = torch.zeros(count, 2, dtype=torch.long)
        first = end = 0
        for begin, stop, images in visible_images(cache.places[0], start + count):
            if stop <= start:
                continue
            if not group or images[0] is not group[0]:
                group, first = [], end
            fresh = images[len(group) :]
            group = [*group, *fresh]
            seen += fresh
            end += sum(cache.encoded[image.content_hash][0][0].shape[2] for image in fresh)
            visible[max(begin - start, 0) : stop - start] = torch.tensor([first, end])
        self._check_images(len(seen))
        return seen, visible

    def _check_images(self, count: int) -> None:
        if count > self.limits.max_images:
            raise ExportError(
                f"{count} pictures are seen at once and the model was exported for"
                f" {self.limits.max_images}; export it again with a larger --max-images"
            )

    def _joined(self, cache: MllamaCache, seen: Sequence[Place]) -> list[Tensor]:
        """Keys and values of the pictures one after the other, [1, G, M, D], layer by layer."""
        layers = range(cache.num_cross_layers) if seen else ()
        return [part for layer in layers for part in cache.joined(hashes(seen), layer)]


model = ExportedModel  # as models.build.Programs names it
