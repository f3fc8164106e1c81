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
from torch import Tensor, nn
from torch.export import Dim

from mmchat.models.base import ExportLimits, ExportProgram
from mmchat.models.mllama.cache import CAPACITY_STEP, MllamaCache, PlacedImage, visible_images
from mmchat.models.mllama.export import ExportedModel as BaseModel
from mmchat.models.mllama.export_parts import Examples, Vision, capacity, pairs
from mmchat.models.mllama.model import MllamaForConditionalGeneration, MllamaInputs
from mmchat.models.mllama.text import CrossAttentionLayer, KeyValue, SelfAttentionLayer
from mmchat.nn.attention import merge_heads, split_heads

LONGEST_PIECE = 128  # positions read at once
MOST_WANTED = 16  # logits returned at once


class _Read(nn.Module):
    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        wanted: Tensor,
        sees: Tensor,
        cached: list[Tensor],
        cross: list[Tensor],
    ) -> list[Tensor]:
        text = self.model.language_model.model
        x = text.embed_tokens(input_ids)
        new = torch.arange(input_ids.shape[1], device=x.device)
        cos, sin = text.rotary((position + new)[None])
        per_group = text.config.num_attention_heads // text.config.num_key_value_heads
        mask = _mask(position, cached[0].shape[2], new, per_group)
        past, seen = iter(pairs(cached)), iter(pairs(cross))
        fresh = []
        for layer in text.layers:
            if isinstance(layer, SelfAttentionLayer):
                own = layer.self_attn
                query, key, value = own.project(layer.input_layernorm(x), cos, sin)
                attended = _attend(query, [next(past), (key, value)], mask)
                x = layer.mlp_branch(x + own.o_proj(merge_heads(attended)))
                fresh += [key, value]
            elif isinstance(layer, CrossAttentionLayer):
                x = _cross(layer, x, next(seen), sees)
        hidden = text.norm(x).index_select(1, wanted)
        return [self.model.language_model.lm_head(hidden), *fresh]


def _mask(position: Tensor, past: int, new: Tensor, per_group: int) -> Tensor:
    """0 where a new position may attend, else -inf: [per_group·S, past + S].

    The rows are those of the query heads of a group, one head after the other.
    """
    before = (torch.arange(past, device=new.device) < position)[None].expand(new.shape[0], -1)
    allowed = torch.cat((before, new[None] <= new[:, None]), dim=1)
    return torch.where(allowed, 0.0, -math.inf).repeat(per_group, 1)


def _attend(query: Tensor, parts: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
    """Attention to keys and values that lie in several tensors, none of which is copied.

    query: [1, H, S, D], parts: [1, G, N, D] twice each -> [1, H, S, D]. mask: [H/G·S, all N].
    Products of three axes suit more runtimes than products of four.
    """
    _, heads, count, dim = query.shape
    groups = parts[0][0].shape[1]
    folded = (query * dim**-0.5).reshape(groups, heads // groups * count, dim)
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
    return out.reshape(1, heads, count, dim)


def _cross(layer: CrossAttentionLayer, x: Tensor, seen: KeyValue, sees: Tensor) -> Tensor:
    """The layer as it is, or nothing of it where `sees` is 0."""
    own = layer.cross_attn
    query = own.q_norm(split_heads(own.q_proj(layer.input_layernorm(x)), own.head_dim))
    attended = own.o_proj(merge_heads(_attend(query, [seen], None)))
    x = x + sees * layer.cross_attn_attn_gate.tanh() * attended
    branch = layer.mlp(layer.post_attention_layernorm(x))
    return x + sees * layer.cross_attn_mlp_gate.tanh() * branch


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
    sees = torch.ones(1, device=model.device, dtype=model.dtype)
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

    @torch.inference_mode()
    def prefill(self, inputs: MllamaInputs, cache: MllamaCache) -> Tensor:
        """Read new positions; float32 logits [1, V] of the last one."""
        start, count = cache.length, inputs.lengths[0]
        self._check_room(start + count)
        self.encode_images(inputs, cache)
        cache.place(0, [PlacedImage(at, image.content_hash) for at, image in inputs.images[0]])
        last = torch.zeros(1, dtype=torch.long)
        logits = None
        for begin, end, images in self._pieces(cache, start, start + count):
            ids = inputs.input_ids[:, begin - start : end - start]
            logits = self._step(ids, last + (end - begin - 1), cache, self._seen(cache, images))
            cache.advance([end - begin])
        if logits is None:
            raise ValueError("there is nothing to read")
        return logits[:, 0]

    @torch.inference_mode()
    def verify(self, token_ids: Tensor, cache: MllamaCache) -> Tensor:
        """Read the next tokens, token_ids: [1, S]; float32 logits [1, S, V] of all."""
        self._check_room(cache.length + token_ids.shape[1])
        images = cache.decode_images()
        seen = [t for pair in images.key_values for t in pair] if images else []
        logits = []
        for ids in token_ids.split(MOST_WANTED, dim=1):
            logits.append(self._step(ids, torch.arange(ids.shape[1]), cache, seen))
            cache.advance_all(ids.shape[1])
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    @torch.inference_mode()
    def decode(self, token_ids: Tensor, cache: MllamaCache) -> Tensor:
        """Read one more token, token_ids: [1, 1]; float32 logits [1, V]."""
        return self.verify(token_ids, cache)[:, 0]

    def _pieces(
        self, cache: MllamaCache, start: int, end: int
    ) -> Iterator[tuple[int, int, list[PlacedImage]]]:
        """Positions start .. end cut where other pictures come into sight, and where too long."""
        sights = visible_images(cache.images[0], end)
        first = sights[0][0] if sights else end
        for begin, stop, images in [(0, first, []), *sights]:
            for at in range(max(begin, start), stop, LONGEST_PIECE):
                yield at, min(at + LONGEST_PIECE, stop), images

    def _seen(self, cache: MllamaCache, images: Sequence[PlacedImage]) -> list[Tensor]:
        self._check_images(len(images))
        return list(self._joined(cache, images)) if images else []

    def _step(
        self, input_ids: Tensor, wanted: Tensor, cache: MllamaCache, cross: list[Tensor]
    ) -> Tensor:
        """Logits [1, R, V] of the `wanted` ones of a few new positions; the cache is written."""
        start = cache.length
        cache.reserve(start + input_ids.shape[1])
        cached = [t for layer in cache.layers for t in (layer.key, layer.value)]
        sees = torch.full((1,), 1.0 if cross else 0.0, dtype=self.dtype)
        arguments = [input_ids, torch.tensor([start]), wanted, sees, *cached]
        logits, *fresh = self._run("read", [*arguments, *(cross or self._nothing())])
        for layer, (key, value) in zip(cache.layers, pairs(fresh), strict=True):
            layer.write_span(start, key, value)
        return logits

    def _nothing(self) -> list[Tensor]:
        """In the place of the keys and values of pictures."""
        text, tokens = self.config.text_config, self.config.vision_config.tokens_per_tile
        empty = torch.zeros(1, text.num_key_value_heads, tokens, text.head_dim, dtype=self.dtype)
        return [empty] * (2 * len(text.cross_attention_layers))
