"""The toy's math: a decoder that reads pictures as embeddings in place of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mmchat.models.base import Batch, Block, Cache, Example
from mmchat.models.prompt import Media
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import Past, PastRows, Spans, past_steps
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import MLP, GatedMLP
from mmchat.nn.norm import RMSNorm
from mmchat.nn.rope import rotate, turns
from tests.toy.cache import CAPACITY_STEP, ToyCache, own
from tests.toy.config import ToyConfig


class ToyVision(nn.Module):
    """patches: [P, 3·8·8] -> embeddings [P, E]."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, size)
        self.position_embedding = nn.Parameter(torch.zeros(config.positions_per_image, size))
        self.mlp = MLP(size, config.intermediate_size)

    def embed(self, patches: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding

    def forward(self, patches: Tensor) -> Tensor:
        return self.mix(self.embed(patches))

    def mix(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past) -> Tensor:
        normed = self.input_layernorm(x)
        projections = (self.q_proj(normed), self.k_proj(normed), self.v_proj(normed))
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)
        attended = past.attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        x = x + self.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class ToyModel(nn.Module):
    """models.build.FamilyModel."""

    kv_dtype: torch.dtype | None = None

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ToyVision(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.remarks: list[str] = []

    def new_cache(self, slots: int, positions: int) -> ToyCache:
        return ToyCache(self.config, slots, positions, self.norm.weight, self.kv_dtype)

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        [patches] = media[0].tensors
        x = self.vision.embed(patches.to(self.norm.weight))
        yield media[:1]
        x = self.vision.mix(x)
        yield media[:1]
        own(cache).encoded[media[0].content_hash] = x

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        rows = own(cache)
        batch.check(rows.lengths)
        for row in batch.rows():
            rows.reserve(row.slot, row.end)
        pictures = rows.pictures(batch)
        is_step = pictures is None and batch.wants_all and len(batch.slots) == 1
        reads = self._step if is_step and batch.starts[0] else partial(self._read, pictures)
        logits = reads(batch, rows)
        rows.advance(batch)
        return logits

    def _read(
        self, pictures: tuple[Tensor, Tensor] | None, batch: Batch, cache: ToyCache
    ) -> Tensor:
        """Rows of any lengths."""
        x = self.embed(batch.token_ids)
        if pictures is not None:
            x = x.index_copy(0, *pictures)
        spans = Spans(tuple((row.slot, row.start, row.count) for row in batch.rows()))
        frequencies = [cache.frequencies(row.slot).expand(row.count, -1) for row in batch.rows()]
        past = [PastRows(layer, spans) for layer in cache.layers]
        x = self.decode(x, spans.positions(x.device), torch.cat(frequencies), past)
        return self.head(x[list(batch.wanted)])

    def _step(self, batch: Batch, cache: ToyCache) -> Tensor:
        """The next few tokens of one row."""
        [slot], [start] = batch.slots, batch.starts
        starts = torch.tensor([start], device=batch.token_ids.device)
        cached = [layer.row(slot) for layer in cache.layers]
        return self.step(batch.token_ids[None], starts, cache.frequencies(slot), cached)

    def step(
        self, token_ids: Tensor, starts: Tensor, inv_freq: Tensor, cached: Sequence[KeyValue]
    ) -> Tensor:
        """token_ids: [1, S] at starts .. starts + S; starts: [1] -> float32 [S, V]."""
        return self.head(self.decode_steps(self.embed(token_ids[0]), starts, inv_freq, cached))

    def decode_steps(
        self, x: Tensor, starts: Tensor, inv_freq: Tensor, cached: Sequence[KeyValue]
    ) -> Tensor:
        positions = starts + torch.arange(x.shape[0], device=x.device)
        past = past_steps(cached, positions[None], cached[0][0].shape[2])
        return self.decode(x, positions, inv_freq, past)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the table; of some picture's position, any."""
        return self.embed_tokens(token_ids.clamp(max=self.config.vocab_size - 1))

    def decode(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, past: Sequence[Past]
    ) -> Tensor:
        """x: [N, E] -> [N, E]; inv_freq: [D/2], or [N, D/2]."""
        cos, sin = turns(positions, inv_freq)
        for layer, of_layer in zip(self.layers, past, strict=True):
            x = layer(x, cos, sin, of_layer)
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x)).float()

    def blocks(self) -> list[Block]:
        layers = list(self.layers)
        return [
            Block(layers, "decode", partial(self._example, 1)),
            Block(layers, "verify", partial(self._example, 3)),
        ]

    def _example(self, count: int) -> Example:
        """Arguments of a layer for `count` tokens."""
        config, like = self.config, self.norm.weight
        row = self.new_cache(1, CAPACITY_STEP).layers[0].row(0)
        positions = torch.arange(count, device=like.device)
        [past] = past_steps([row], positions[None], CAPACITY_STEP)
        x = like.new_zeros(count, config.hidden_size)
        cos, sin = turns(positions, positions.new_zeros(config.head_dim // 2).float())
        dynamic = [(past.key, 2), (past.value, 2), (past.mask, 3)]
        if count > 1:
            dynamic += [(x, 0), (cos, 0), (sin, 0), (past.positions, 1), (past.mask, 2)]
        return Example((x, cos, sin, past), tuple(dynamic))

    def weight_names(self, *, text_only: bool) -> set[str]:
        return {n for n in self.state_dict() if not (text_only and n.startswith("vision."))}

    def linear_parts(self) -> dict[str, str]:
        parts = {"layers": "text", "lm_head": "head", "vision": "vision"}
        modules = self.named_modules()
        return {n: parts[n.split(".")[0]] for n, module in modules if isinstance(module, Linear)}

    def fuse_projections(self) -> None:
        for module in self.modules():
            if isinstance(module, GatedMLP):
                module.fuse_projections()

    def finish_loading(self, device: torch.device) -> None:
        """Nothing follows from the weights."""
