"""What the models of families share, and the passes of those whose pictures take positions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmchat.models.base import Batch, Block, Cache, Example, Use
from mmchat.models.prompt import Media
from mmchat.models.row_cache import CAPACITY_STEP, RowCache
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import Past, Spans, past_steps
from mmchat.nn.linear import Linear
from mmchat.nn.rope import RotaryEmbedding


class EmbeddingCache(RowCache[Tensor]):
    """encoded: embeddings [count, E] that stand in place of tokens, until these are read.

    of_rows: tensors [slots, ...] that tokens of a slot are read with, which stay where they are.
    """

    of_rows: tuple[Tensor, ...] = ()

    def beside(self, slots: range) -> tuple[Tensor, ...]:
        return tuple(rows[slots.start : slots.stop] for rows in self.of_rows)

    def _needed(self) -> set[str]:
        rows = zip(self.places, self.lengths, strict=True)
        return {p.content_hash for places, length in rows for p in places if p.end > length}

    def pictures(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Where in the batch pictures lie, [K], and their embeddings there, [K, E].

        A batch may begin and end inside of a picture.
        """
        index: list[int] = []
        parts: list[Tensor] = []
        for first, part in self._parts(batch):
            index += range(first, first + len(part))
            parts.append(part)
        if not index:
            return None
        return torch.tensor(index, device=self.positions.device), torch.cat(parts)

    def _parts(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        for row in batch.rows():
            for place in self.places[row.slot]:
                first, end = max(place.start, row.start), min(place.end, row.end)
                if first < end:
                    embeddings = self.encoded[place.content_hash]
                    part = embeddings[first - place.start : end - place.start]
                    yield first - row.start + row.offset, part


DRAFT = 4  # tokens verified at once in the example of a layer
# Layers of a type, what they are used for, and what makes their arguments (models.base.Block).
LayerKind = tuple[type[nn.Module], Use, Callable[[], Example]]


class UsualModel(nn.Module):
    """Most of models.build.FamilyModel, for a family that says what is abstract.

    cache_type: of what `new_cache` makes; it takes the config's `text_config`. The output head is
    a module named `lm_head`. What has a body here is for models whose text is in a module named
    `language_model` (nn.decoder.LanguageModel), as in most of the Hub's checkpoints.
    """

    cache_type: ClassVar[type[RowCache[Any]]]
    language_model: Any
    # See models.base.CompilableModel. It takes token ids [R, S], their starts [R], keys and values
    # [R, G, L, D] of each layer, which it writes, and what RowCache.beside gives.
    step: Callable[..., Tensor]
    ranks = 1
    kv_dtype: torch.dtype | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.remarks: list[str] = []

    @property
    def like(self) -> Tensor:
        """A tensor of the model's device and dtype."""
        return self.language_model.model.norm.weight

    def new_cache(self, slots: int, positions: int) -> RowCache[Any]:
        """An empty cache of so many rows, with room for `positions` in each."""
        sizes = self.config.text_config, slots, positions, self.like
        how = {"ranks": self.ranks, "dtype": self.kv_dtype}
        return self.cache_type(*sizes, fixed=self.like.is_cuda, **how)

    def is_vision(self, name: str) -> bool:
        """Whether the weight encodes pictures."""
        return not name.startswith("language_model.")

    def is_for_pictures(self, name: str) -> bool:
        """Whether only pictures need the weight."""
        return self.is_vision(name)

    def is_unused(self, name: str) -> bool:
        """Whether nothing needs the weight."""
        return False

    def head(self, hidden: Tensor) -> Tensor:
        """[N, E] -> [N, V]"""
        return self.language_model.lm_head(hidden)

    @abstractmethod
    def hidden(self, batch: Batch, positions: Tensor, past: Sequence[Past], cache: Any) -> Tensor:
        """Normalised hidden states [N, E] of rows of any lengths, in which pictures may stand.

        positions: [N]. past: one for each layer of self-attention.
        """

    @abstractmethod
    def layer_kinds(self) -> list[LayerKind]:
        """Those that are worth compiling."""

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Read new positions of several rows into the cache; float32 logits [W, V].

        Differentiable for rows that start at 0, pictures included. Raises ValueError if a row does
        not start where its slot ends, TypeError for a cache of another kind.
        """
        rows = RowCache.of(cache)
        batch.check(rows.lengths)
        for slot, length in rows.short_of(batch):
            rows.reserve(slot, length)
        logits = self._step(batch, rows) if rows.is_step(batch) else self._read(batch, rows)
        rows.advance(batch)
        return logits

    def _read(self, batch: Batch, cache: RowCache[Any]) -> Tensor:
        spans = Spans(tuple((row.slot, row.start, row.count) for row in batch.rows()))
        positions = spans.positions(self.like.device)
        hidden = self.hidden(batch, positions, cache.past(spans), cache)
        return self.head(hidden if batch.wants_all else hidden[list(batch.wanted)]).float()

    def _step(self, batch: Batch, cache: RowCache[Any]) -> Tensor:
        """A few next tokens of each row; in fixed slots all slots are computed."""
        if not cache.fixed:
            [slot] = batch.slots
            start, beside = cache.positions[slot : slot + 1], cache.beside(range(slot, slot + 1))
            return self.step(batch.token_ids[None], start, cache.rows(slot), *beside)
        every, beside = cache.in_all_slots(batch), cache.beside(range(len(cache.lengths)))
        cached = [layer.whole[0] for layer in cache.layers]
        logits = self.step(every, cache.positions, cached, *beside)
        by_slot = logits.unflatten(0, (-1, batch.counts[0]))
        return torch.cat([by_slot[slot] for slot in batch.slots])

    def blocks(self) -> list[Block]:
        """The kinds of layer that are worth compiling, of those that are not on the meta device."""
        blocks = []
        for kind, use, example in self.layer_kinds():
            layers = [layer for layer in self.modules() if type(layer) is kind]
            layers = [layer for layer in layers if not any(p.is_meta for p in layer.parameters())]
            blocks += [Block(layers, use, example)] if layers else []
        return blocks

    def decoder_kinds(
        self, kind: type[nn.Module], of_positions: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[LayerKind]:
        """Of layer(x, *tensors, past) in steps. of_positions: the tensors [N, ...] of some [N]."""

        def example(count: int) -> Example:
            positions = torch.arange(count, device=self.like.device)
            cached = self.new_cache(1, CAPACITY_STEP).rows(0)
            [past] = past_steps(cached[:1], positions[None], CAPACITY_STEP)
            by_token = (self.like.new_zeros(count, *self.like.shape), *of_positions(positions))
            dynamic = [(past.key, 2), (past.value, 2), (past.mask, 3)]
            if count > 1:
                dynamic += [*((tensor, 0) for tensor in by_token), (past.positions, 1)]
                dynamic.append((past.mask, 2))
            return Example((*by_token, past), tuple(dynamic))

        return [(kind, "decode", partial(example, 1)), (kind, "verify", partial(example, DRAFT))]

    def picture_kind(self, kind: type[nn.Module], shape: tuple[int, ...]) -> LayerKind:
        """Of a layer of the encoder. shape: of a picture in it."""
        return kind, "vision", lambda: Example((self.like.new_zeros(*shape),))

    def weight_names(self, *, text_only: bool) -> set[str]:
        """Names of the weights to load."""
        used = {name for name in self.state_dict() if not self.is_unused(name)}
        return {name for name in used if not (text_only and self.is_for_pictures(name))}

    def linear_parts(self) -> dict[str, str]:
        """Which part each linear layer belongs to: "text", "head" or "vision"."""
        return {
            name: "vision"
            if self.is_vision(f"{name}.")
            else ("head" if name.endswith("lm_head") else "text")
            for name, module in self.named_modules()
            if isinstance(module, Linear) and not self.is_unused(f"{name}.")
        }

    def finish_loading(self, device: torch.device) -> None:
        """Once the weights are there: frequencies were computed when the model was built."""
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.inv_freq = module.inv_freq.to(device)

    def fuse_projections(self) -> None:
        """Join the projections that read the same input, once the weights are loaded."""
        for module in list(self.modules())[1:]:
            fuse = getattr(module, "fuse_projections", None)
            if fuse is not None:
                fuse()


class EmbeddingModel(UsualModel):
    """Most of a model whose pictures take positions: each is read as embeddings of tokens are.

    of_rows: what each row is read with, [R, ...] (EmbeddingCache.of_rows); `decode` is given it for
    each token, [N, ...].
    """

    cache_type = EmbeddingCache

    @abstractmethod
    def encode_slices(self, pixels: Tensor, embeddings: list[Tensor]) -> Iterator[None]:
        """Encode pictures [I, C, S, S], a layer at a time, so that others may work between them.

        What stands in place of tokens is added to `embeddings` at the end: [I, count, E].
        """

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] -> [N, E]; at the positions of pictures any row, for their ids may have none."""

    @abstractmethod
    def decode(
        self, x: Tensor, positions: Tensor, past: Sequence[Past], *of_tokens: Tensor
    ) -> Tensor:
        """x: [N, E] at positions [N] -> normalised hidden states [N, E]. past: one a layer."""

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        """Put the first picture into the cache, by itself; each next() computes one layer."""
        [pixels] = media[0].tensors
        embeddings: list[Tensor] = []
        for _ in self.encode_slices(pixels[None].to(self.like), embeddings):
            yield media[:1]
        EmbeddingCache.of(cache).encoded[media[0].content_hash] = embeddings.pop()[0]

    def hidden(
        self, batch: Batch, positions: Tensor, past: Sequence[Past], cache: EmbeddingCache
    ) -> Tensor:
        x = self.embed(batch.token_ids)
        if pictures := cache.pictures(batch):
            x = x.index_copy(0, *pictures)
        of_tokens = [
            torch.cat([rows[row.slot].expand(row.count, *rows.shape[1:]) for row in batch.rows()])
            for rows in cache.of_rows
        ]
        return self.decode(x, positions, past, *of_tokens)

    def step(
        self, token_ids: Tensor, starts: Tensor, cached: Sequence[KeyValue], *of_rows: Tensor
    ) -> Tensor:
        """`forward` as a function of static tensors: the next tokens of R rows.

        token_ids: [R, S] at starts .. starts + S, starts: [R] -> float32 [R·S, V]. cached: keys and
        values [R, G, L, D] of each layer, written in place.
        """
        count = token_ids.shape[1]
        positions = starts[:, None] + torch.arange(count, device=starts.device)
        past = past_steps(cached, positions, cached[0][0].shape[2])
        of_tokens = [rows.repeat_interleave(count, dim=0) for rows in of_rows]
        x = self.embed(token_ids.flatten())
        return self.head(self.decode(x, positions.flatten(), past, *of_tokens)).float()
