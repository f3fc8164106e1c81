"""What the models of families share, and the passes of those whose pictures take positions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmchat.models.base import Batch, Cache
from mmchat.models.embedding_cache import EmbeddingCache
from mmchat.models.prompt import Media
from mmchat.models.row_cache import RowCache, of_slots
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import Past, Spans, past_steps
from mmchat.nn.linear import Linear
from mmchat.nn.rope import RotaryEmbedding


class UsualModel(nn.Module):
    """Most of models.build.FamilyModel, for a family that says what is abstract.

    cache_type: of what `new_cache` makes; it takes the config's `text_config`. The output head is
    a module named `lm_head`.
    """

    cache_type: ClassVar[type[RowCache[Any]]]
    ranks = 1
    kv_dtype: torch.dtype | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.remarks: list[str] = []

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the model's device and dtype."""

    def new_cache(self, slots: int, positions: int) -> RowCache[Any]:
        """An empty cache of so many rows, with room for `positions` in each."""
        sizes = self.config.text_config, slots, positions, self.like
        how = {"ranks": self.ranks, "dtype": self.kv_dtype}
        return self.cache_type(*sizes, fixed=self.like.is_cuda, **how)

    @abstractmethod
    def is_vision(self, name: str) -> bool:
        """Whether the weight encodes pictures."""

    def is_for_pictures(self, name: str) -> bool:
        """Whether only pictures need the weight."""
        return self.is_vision(name)

    def is_unused(self, name: str) -> bool:
        """Whether nothing needs the weight."""
        return False

    @abstractmethod
    def _read(self, batch: Batch, cache: Any) -> Tensor:
        """Logits [W, V] of rows of any lengths, in which pictures may stand."""

    @abstractmethod
    def _step(self, batch: Batch, cache: Any) -> Tensor:
        """Those of a few next tokens of each row; in fixed slots all slots are computed."""

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Read new positions of several rows into the cache; float32 logits [W, V].

        Differentiable for rows that start at 0, pictures included. Raises ValueError if a row does
        not start where its slot ends, TypeError for a cache of another kind.
        """
        return RowCache.of(cache).read(batch, self._step, self._read)

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

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """[N, E] -> [N, V]"""

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        """Put the first picture into the cache, by itself; each next() computes one layer."""
        [pixels] = media[0].tensors
        embeddings: list[Tensor] = []
        for _ in self.encode_slices(pixels[None].to(self.like), embeddings):
            yield media[:1]
        EmbeddingCache.of(cache).encoded[media[0].content_hash] = embeddings.pop()[0]

    def _read(self, batch: Batch, cache: EmbeddingCache) -> Tensor:
        """Rows of any lengths, in which pictures may stand."""
        x = self.embed(batch.token_ids)
        if pictures := cache.pictures(batch):
            x = x.index_copy(0, *pictures)
        spans = Spans(tuple((row.slot, row.start, row.count) for row in batch.rows()))
        of_tokens = [
            torch.cat([rows[row.slot].expand(row.count, *rows.shape[1:]) for row in batch.rows()])
            for rows in cache.of_rows
        ]
        hidden = self.decode(x, spans.positions(x.device), cache.past(spans), *of_tokens)
        if not batch.wants_all:
            hidden = hidden[list(batch.wanted)]
        return self.head(hidden).float()

    def _step(self, batch: Batch, cache: EmbeddingCache) -> Tensor:
        """A few next tokens of each row; in fixed slots all slots are computed."""
        if not cache.fixed:
            [slot] = batch.slots
            positions, *of_rows = (
                rows[slot : slot + 1] for rows in (cache.positions, *cache.of_rows)
            )
            return self.step(batch.token_ids[None], positions, cache.rows(slot), *of_rows)
        every = cache.in_all_slots(batch)
        logits = self.step(every, cache.positions, cache.all_rows(), *cache.of_rows)
        return of_slots(logits, batch)

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
