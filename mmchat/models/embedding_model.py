"""The passes of a model whose pictures take positions: each is read as embeddings of tokens are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmchat.models.base import Batch, Cache
from mmchat.models.embedding_cache import EmbeddingCache, own
from mmchat.models.row_cache import of_slots
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import Past, Spans, past_steps


class EmbeddingModel(nn.Module):
    """`forward` and `step` of models.base, for a family that says what is below.

    of_rows: what each row is read with, [R, ...] (EmbeddingCache.of_rows); `decode` is given it for
    each token, [N, ...].
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

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Read new positions of several rows into the cache; float32 logits [W, V].

        Differentiable for rows that start at 0, pictures included. Raises ValueError if a row does
        not start where its slot ends.
        """
        rows = own(cache)
        batch.check(rows.lengths)
        for row in batch.rows():
            rows.reserve(row.slot, row.end)
        logits = self._step(batch, rows) if rows.is_step(batch) else self._read(batch, rows)
        rows.advance(batch)
        return logits

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
