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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim

from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.models.base import ExportLimits, ExportProgram, RunProgram
from mmchat.models.mllama.cache import MllamaCache, PlacedImage, visible_images
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.export_parts import Examples, Vision, capacity, pairs
from mmchat.models.mllama.model import MllamaForConditionalGeneration, MllamaInputs

if TYPE_CHECKING:
    from collections.abc import Iterable


# The programs


class _Prefill(nn.Module):
    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

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
        mask = (columns >= first) & (columns < end) | ~sees
        text = self.model.language_model
        hidden = text.model.step(
            input_ids,
            position,
            pairs(cached),
            pairs(cross),
            mask[None, None],
            sees[None],
            length.shape[0],
        )
        return text.lm_head(hidden[:, wanted]).float()


class _PrefillText(nn.Module):
    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        length: Tensor,
        wanted: Tensor,
        cached: list[Tensor],
    ) -> Tensor:
        text = self.model.language_model
        hidden = text.model.step(
            input_ids, position, pairs(cached), None, None, None, length.shape[0]
        )
        return text.lm_head(hidden[:, wanted]).float()


class _Decode(nn.Module):
    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token_id: Tensor, position: Tensor, cached: list[Tensor], cross: list[Tensor]
    ) -> Tensor:
        return self.model.decode_step(token_id, position, pairs(cached), pairs(cross))


class _DecodeText(nn.Module):
    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_id: Tensor, position: Tensor, cached: list[Tensor]) -> Tensor:
        return self.model.decode_step(token_id, position, pairs(cached), None)


def export_programs(
    model: MllamaForConditionalGeneration, limits: ExportLimits
) -> list[ExportProgram]:
    """The programs of `model`, with example arguments on its device and in its dtype."""
    vision = model.config.vision_config
    examples = Examples(model)
    ids, tiles = examples.ids, examples.tiles
    cached, cross = examples.cached(capacity(limits.max_seq_len)), examples.cross()
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
        ("decode_text", _DecodeText(model), (*step, cached), None),
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

    def new_cache(self, batch: int, wanted: int) -> MllamaCache:
        """An empty cache of the size that the programs take."""
        if batch != 1:
            raise ExportError(f"an exported model reads one conversation at a time, not {batch}")
        room = self._capacity(wanted)
        return MllamaCache(self.config.text_config, 1, room, self.device, self.dtype)

    def _capacity(self, _wanted: int) -> int:
        return capacity(self.limits.max_seq_len)

    @torch.inference_mode()
    def encode_images(self, inputs: MllamaInputs, cache: MllamaCache) -> int:
        """Encode the pictures of `inputs` that the cache does not hold; how many there were."""
        encoded = 0
        for _, image in inputs.images[0]:
            if image.content_hash in cache.encoded:
                cache.encoded.move_to_end(image.content_hash)
                continue
            tiles = image.pixel_values[None].to(self.device, self.dtype)
            ratio = torch.tensor([image.layout.aspect_ratio_id], device=self.device)
            out = self._run(self._vision_program(tiles.shape[1]), (tiles, ratio))
            own = tuple((key[0], value[0]) for key, value in pairs(out))
            cache.add_encoded(image.content_hash, own)
            encoded += 1
        return encoded

    def _vision_program(self, num_tiles: int) -> str:
        is_full = num_tiles == self.config.vision_config.max_num_tiles
        return "vision_full" if is_full else "vision"

    @torch.inference_mode()
    def prefill(self, inputs: MllamaInputs, cache: MllamaCache) -> Tensor:
        """Read new positions; float32 logits [1, V] of the last one."""
        start, count = cache.length, inputs.lengths[0]
        self._check_room(start + count)
        self.encode_images(inputs, cache)
        cache.place(0, [PlacedImage(at, image.content_hash) for at, image in inputs.images[0]])
        if count == 1:
            return self.decode(inputs.input_ids.to(self.device), cache)
        seen, visible = self._visible(cache, start, count)
        cross = list(self._joined(cache, seen))
        last = torch.tensor([count - 1])
        logits = self._read(inputs.input_ids, cache, last, visible, cross)
        cache.advance(inputs.lengths)
        return logits[:, 0]

    @torch.inference_mode()
    def verify(self, token_ids: Tensor, cache: MllamaCache) -> Tensor:
        """Read the next tokens, token_ids: [1, S]; float32 logits [1, S, V] of all."""
        count = token_ids.shape[1]
        self._check_room(cache.length + count)
        if count == 1:
            return self.decode(token_ids, cache)[:, None]
        images = cache.decode_images()
        cross = [t for pair in images.key_values for t in pair] if images else []
        visible = torch.tensor([[0, cross[0].shape[2] if cross else 0]]).repeat(count, 1)
        logits = self._read(token_ids, cache, torch.arange(count), visible, cross)
        cache.advance_all(count)
        return logits

    def _read(
        self,
        input_ids: Tensor,
        cache: MllamaCache,
        wanted: Tensor,
        visible: Tensor,
        cross: list[Tensor],
    ) -> Tensor:
        """Logits [1, R, V] of the `wanted` ones of several new positions; the cache is written."""
        length = torch.empty(cache.length + input_ids.shape[1], dtype=torch.long)
        arguments = [input_ids, cache.positions, length, wanted, *([visible] if cross else [])]
        arguments = [tensor.to(self.device) for tensor in arguments]
        cached = [t for layer in cache.layers for t in (layer.key, layer.value)]
        return self._run("prefill" if cross else "prefill_text", [*arguments, *cached, *cross])[0]

    @torch.inference_mode()
    def decode(self, token_ids: Tensor, cache: MllamaCache) -> Tensor:
        """Read one more token, token_ids: [1, 1]; float32 logits [1, V]."""
        self._check_room(cache.length + 1)
        images = cache.decode_images()
        arguments = [token_ids, cache.positions]
        arguments += [t for layer in cache.layers for t in (layer.key, layer.value)]
        if images:
            arguments += [t for pair in images.key_values for t in pair]
        logits = self._run("decode" if images else "decode_text", arguments)[0]
        cache.advance_all(1)
        return logits

    def _check_room(self, length: int) -> None:
        if length > self.limits.max_seq_len:
            raise ContextLengthExceeded(
                f"{length} positions are needed and the model was exported for"
                f" {self.limits.max_seq_len}; export it again with a larger --max-seq-len"
            )

    def _visible(
        self, cache: MllamaCache, start: int, count: int
    ) -> tuple[list[PlacedImage], Tensor]:
        """The pictures that new positions see, and for each position its span of their tokens."""
        seen: list[PlacedImage] = []
        group: list[PlacedImage] = []
        visible = torch.zeros(count, 2, dtype=torch.long)
        first = end = 0
        for begin, stop, images in visible_images(cache.images[0], start + count):
            if stop <= start:
                continue
            if not group or images[0] is not group[0]:
                group, first = [], end
            fresh = images[len(group) :]
            group = [*group, *fresh]
            seen += fresh
            end += sum(cache.encoded[image.content_hash][0][0].shape[1] for image in fresh)
            visible[max(begin - start, 0) : stop - start] = torch.tensor([first, end])
        self._check_images(len(seen))
        return seen, visible

    def _check_images(self, count: int) -> None:
        if count > self.limits.max_images:
            raise ExportError(
                f"{count} pictures are seen at once and the model was exported for"
                f" {self.limits.max_images}; export it again with a larger --max-images"
            )

    def _joined(self, cache: MllamaCache, seen: Sequence[PlacedImage]) -> Iterable[Tensor]:
        """Keys and values of the pictures one after the other, [1, G, M, D], layer by layer."""
        pictures = [cache.encoded[image.content_hash] for image in seen]
        for layer in zip(*pictures, strict=True):
            for part in zip(*layer, strict=True):
                yield part[0][None] if len(part) == 1 else torch.cat(part, dim=1)[None]
