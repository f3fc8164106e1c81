"""Mllama as programs without side effects, for runtimes that plan their memory ahead.

Programs (B = 1; for each self-attention layer `cached` holds a key and a value tensor
[1, G, L, D], for each cross-attention layer `cross` one pair [1, G, M, D]):

    vision_T   tiles [1, T, C, S, S], aspect_ratio_id [1] -> cross, M = T·P; one for each T
    read       ids [1, S], position [1], wanted [R], sees [1], cached, cross
                                     -> logits [1, R, V], new keys and values as `cached` with L = S

`read` is prefill and decode in one, so that its weights are in memory once. All S positions see all
of `cross`, or nothing if `sees` is 0 and not 1. The caller adds the new keys and values to its
cache, and reads longer texts, or texts that see several groups of pictures, in pieces.

L, M, S and R are dynamic; the first `position` of the L positions count. T is not: XNNPACK gives
wrong results for pictures of several tiles if the first one had a single tile (executorch 1.4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.export import Dim

from mmchat.models.base import Batch, ExportLimits, ExportProgram
from mmchat.models.mllama.cache import MllamaCache, visible_images
from mmchat.models.mllama.export import ExportedModel as BaseModel
from mmchat.models.mllama.export_parts import Examples, Program, Vision, capacity, pairs
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.row_cache import CAPACITY_STEP, Place
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import heads_first

# Both are small because ExecuTorch plans memory for the most that a program may be given.
LONGEST_PIECE = 128  # positions read at once
MOST_WANTED = 16  # logits returned at once


class _PastParts:
    """The past of a layer as what was stored before and what is new, which the caller stores."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor) -> None:
        self._before, self._mask = (key, value), mask
        self.new: KeyValue | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.new = heads_first(key), heads_first(value)
        return _attend(query, [self._before, self.new], self._mask)


class _SeenAll:
    """Pictures that all positions see, or none of them where `sees` is 0 and not 1."""

    def __init__(self, key: Tensor, value: Tensor, sees: Tensor) -> None:
        self._seen, self._sees = (key, value), sees

    def take(self, x: Tensor) -> Tensor:
        return x

    def attend(self, query: Tensor) -> Tensor:
        return _attend(query, [self._seen], None)

    def put(self, x: Tensor, read: Tensor) -> Tensor:
        return torch.where(self._sees > 0, read, x)


class _Read(Program):
    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        wanted: Tensor,
        sees: Tensor,
        cached: list[Tensor],
        cross: list[Tensor],
    ) -> list[Tensor]:
        text = self.model.language_model
        new = torch.arange(input_ids.shape[1], device=input_ids.device)
        config = self.model.config.text_config
        per_group = config.num_attention_heads // config.num_key_value_heads
        mask = _mask(position, cached[0].shape[2], new, per_group)
        past = [_PastParts(*pair, mask) for pair in pairs(cached)]
        seen = [_SeenAll(*pair, sees) for pair in pairs(cross)]
        hidden = text.model(input_ids.flatten(), position + new, past, seen)
        logits = text.lm_head(hidden.index_select(0, wanted))
        return [logits[None], *(t for layer in past for t in layer.new or ())]


def _mask(position: Tensor, past: int, new: Tensor, per_group: int) -> Tensor:
    """0 where a new position may attend, else -inf: [per_group·S, past + S].

    The rows are those of the query heads of a group, one head after the other.
    """
    before = (torch.arange(past, device=new.device) < position)[None].expand(new.shape[0], -1)
    allowed = torch.cat((before, new[None] <= new[:, None]), dim=1)
    return torch.where(allowed, 0.0, -math.inf).repeat(per_group, 1)


def _attend(query: Tensor, parts: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
    """Attention to keys and values that lie in several tensors, none of which is copied.

    query: [S, H, D], parts: [1, G, N, D] twice each -> [S, H·D]. mask: [H/G·S, all N].
    Products of three axes suit more runtimes than products of four.
    """
    count, heads, dim = query.shape
    groups = parts[0][0].shape[1]
    per_group = heads // groups
    scaled = query.transpose(0, 1) * dim**-0.5
    folded = scaled.unflatten(0, (groups, per_group)).flatten(1, 2)
    scores = [torch.bmm(folded, key.flatten(0, 1).transpose(1, 2)) for key, _ in parts]
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    weights = torch.softmax(joined if mask is None else joined + mask, dim=-1)
    out, begin = None, 0
    for _, value in parts:
        end = begin + value.shape[2]
        here = weights if len(parts) == 1 else weights[:, :, begin:end]
        product = torch.bmm(here, value.flatten(0, 1))
        out, begin = product if out is None else out + product, end
    assert out is not None  # noqa: S101
    return out.unflatten(1, (per_group, count)).flatten(0, 1).transpose(0, 1).flatten(1)


def export_programs(
    model: MllamaForConditionalGeneration, limits: ExportLimits
) -> list[ExportProgram]:
    """The programs of `model`, with example arguments on its device and in its dtype."""
    examples = Examples(model)
    ids, tiles = examples.ids, examples.tiles
    cached, cross = examples.cached(2 * CAPACITY_STEP), examples.cross()
    new = Dim("new_positions", min=1, max=LONGEST_PIECE)
    rows = Dim("wanted", min=1, max=MOST_WANTED)
    longest = max(capacity(limits.max_seq_len), 2 * CAPACITY_STEP)  # a range is more than one size
    past = Dim("past_positions", min=CAPACITY_STEP, max=longest)
    seen = examples.vision_tokens(limits)
    sees = torch.ones(1, device=model.like.device, dtype=model.like.dtype)
    programs = [
        *(
            (f"vision_{count}", Vision(model), (tiles(count), ids(count)), None)
            for count in range(1, model.config.vision_config.max_num_tiles + 1)
        ),
        (
            "read",
            _Read(model),
            (ids(1, 2, 3)[None], ids(4), ids(1, 2), sees, cached, cross),
            (
                {1: new},
                None,
                {0: rows},
                None,
                [{2: past} for _ in cached],
                [{2: seen} for _ in cross],
            ),
        ),
    ]
    return [ExportProgram(*program) for program in programs]


# The model that calls them


class ExportedModel(BaseModel):
    """Mllama whose math is in these programs; the cache grows with the text."""

    def _vision_program(self, num_tiles: int) -> str:
        return f"vision_{num_tiles}"

    def _capacity(self, wanted: int) -> int:
        return min(wanted, capacity(self.limits.max_seq_len))

    def _forward(self, batch: Batch, cache: MllamaCache) -> Tensor:
        start = batch.starts[0]
        logits = []
        for begin, end, images in self._pieces(cache, batch):
            wanted = [at + start - begin for at in batch.wanted if begin <= at + start < end]
            ids = batch.token_ids[None, begin - start : end - start]
            self._check_images(len(images))
            cross = self._joined(cache, images)
            rows = self._piece(ids, begin, wanted or [0], cache, cross)
            logits.append(rows[: len(wanted)])
        cache.advance(batch)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _pieces(self, cache: MllamaCache, batch: Batch) -> Iterator[tuple[int, int, list[Place]]]:
        """The positions cut where other pictures come into sight, and where too long."""
        start = batch.starts[0]
        end = start + batch.counts[0]
        longest = LONGEST_PIECE if len(batch.wanted) == 1 else MOST_WANTED
        sights = visible_images(cache.places[0], end)
        first = sights[0][0] if sights else end
        for begin, stop, images in [(0, first, []), *sights]:
            for at in range(max(begin, start), stop, longest):
                yield at, min(at + longest, stop), images

    def _piece(
        self,
        input_ids: Tensor,
        start: int,
        wanted: list[int],
        cache: MllamaCache,
        cross: list[Tensor],
    ) -> Tensor:
        """Logits [W, V] of the `wanted` ones of a few new positions; the cache is written."""
        end = start + input_ids.shape[1]
        cache.reserve(0, end)
        sees = torch.full((1,), 1.0 if cross else 0.0, dtype=self.dtype)
        arguments = [input_ids, torch.tensor([start]), torch.tensor(wanted), sees]
        arguments += [*self._cached(cache), *(cross or self._nothing())]
        logits, *fresh = self._run("read", arguments)
        for layer, new in zip(cache.layers, pairs(fresh), strict=True):
            for stored, tensor in zip(layer.row(0), new, strict=True):
                stored[:, :, start:end] = tensor
        return logits[0]

    def _nothing(self) -> list[Tensor]:
        """In the place of the keys and values of pictures: a program takes a tile or more."""
        text, tokens = self.config.text_config, self.config.vision_config.tokens_per_tile
        empty = torch.zeros(1, text.num_key_value_heads, tokens, text.head_dim, dtype=self.dtype)
        return [empty] * (2 * len(text.cross_attention_layers))


model = ExportedModel  # as models.build.Programs names it
