"""The toy's math: a decoder that reads pictures as embeddings in place of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmchat.models.prompt import Media
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import MLP, GatedMLP
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import inverse_frequencies, rotate
from tests.toy._base import Batch, Block, Cache
from tests.toy.cache import PastRows, ToyCache
from tests.toy.config import ToyConfig
from tests.toy.processor import ToyMedia

Rows = list[tuple[int, int, int]]  # slot, start and count of each


class ToyLayer(nn.Module):
    """Pre-norm attention, then a gated MLP. x: [N, E] -> [N, E]; cos, sin: [N, 1, D]."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = Linear(size, size, bias=False)
        self.k_proj = Linear(size, key_size, bias=False)
        self.v_proj = Linear(size, key_size, bias=False)
        self.o_proj = Linear(size, size, bias=False)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.mlp = GatedMLP(size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: PastRows) -> Tensor:
        normed = self.input_layernorm(x)
        projections = (self.q_proj(normed), self.k_proj(normed), self.v_proj(normed))
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)
        attended = past.attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        x = x + self.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class ToyModel(nn.Module):
    """models.base.Model."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, size)
        self.position_embedding = nn.Parameter(torch.zeros(config.positions_per_image, size))
        self.vision_mlp = MLP(size, config.intermediate_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = Linear(size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def new_cache(self, slots: int, positions: int) -> ToyCache:
        return ToyCache(self.config, slots, positions, self.norm.weight)

    def encode(self, media: Media, cache: Cache) -> Iterator[None]:
        assert isinstance(media, ToyMedia)
        assert isinstance(cache, ToyCache)
        x = self.patch_embedding(media.patches.to(self.device, self.dtype))
        x = x + self.position_embedding
        yield
        cache.encoded[media.content_hash] = x + self.vision_mlp(x)
        yield

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        assert isinstance(cache, ToyCache)
        rows = list(zip(batch.slots, batch.starts, batch.counts, strict=True))
        for slot, start, count in rows:
            if cache.lengths[slot] != start:
                raise ValueError(f"slot {slot} has {cache.lengths[slot]} positions, not {start}")
            cache.reserve(slot, start + count)
        x = self._embed(batch.token_ids, rows, cache)
        cos, sin = self._angles(rows, cache)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache.past(index, batch))
        for slot, start, count in rows:
            cache.lengths[slot] = start + count
        return self.lm_head(self.norm(x[list(batch.wanted)])).float()

    def _embed(self, token_ids: Tensor, rows: Rows, cache: ToyCache) -> Tensor:
        """Rows of the table, and pictures in place of ids that it lacks: [N, E]."""
        found = []
        begin = 0
        for slot, start, count in rows:
            found += [(begin + at, part) for at, part in cache.pictures(slot, start, count)]
            begin += count
        ids = token_ids.clone()
        for at, part in found:
            ids[at : at + len(part)] = 0
        x = self.embed_tokens(ids)
        for at, part in found:
            x = torch.cat((x[:at], part, x[at + len(part) :]))
        return x

    def _angles(self, rows: Rows, cache: ToyCache) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all new positions, each row's by its own base: [N, 1, D] twice."""
        angles = []
        for slot, start, count in rows:
            frequencies = inverse_frequencies(self.config.head_dim, cache.rotary_base(slot))
            angles.append(torch.arange(start, start + count)[:, None] * frequencies)
        joined = torch.cat(angles).repeat(1, 2)[:, None].to(self.device)
        return joined.cos(), joined.sin()

    def blocks(self) -> list[Block]:
        return []
