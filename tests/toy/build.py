"""The toy's weights and programs (models.build.Build)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from mmchat.errors import ContextLengthExceeded
from mmchat.models.base import Batch, Cache, ExportLimits, ExportProgram, RunProgram
from mmchat.models.build import Build
from mmchat.models.family import Alpha
from mmchat.models.prompt import Media
from mmchat.tokenizers.base import Tokenizer
from tests.toy.cache import ToyCache, own
from tests.toy.config import ToyConfig
from tests.toy.family import ToyFamily
from tests.toy.model import ToyModel
from tests.toy.processor import ToyProcessor


class ToyBuild(Build[ToyConfig, ToyModel]):
    def shapes(self, config: ToyConfig) -> dict[str, tuple[int, ...]]:
        return ToyFamily().shapes(config)

    def model(self, config: ToyConfig) -> ToyModel:
        return ToyModel(config)

    def processor(self, config: ToyConfig, tokenizer: Tokenizer, alpha: Alpha) -> ToyProcessor:
        return ToyProcessor(config, tokenizer, alpha)

    def programs(self, format: Literal["aoti", "executorch"]) -> ToyPrograms:
        return ToyPrograms()


class ToyPrograms:
    """models.build.Programs: `vision` and `read`, and `decode`, which reads a single token."""

    def export_programs(self, model: ToyModel, limits: ExportLimits) -> list[ExportProgram]:
        config, like = model.config, model.norm.weight
        patches = like.new_zeros(config.positions_per_image, 3 * config.patch_size**2)
        cached = [
            tensor
            for layer in ToyCache(config, 1, limits.max_seq_len, like).layers
            for tensor in layer.row(0)
        ]
        new = Dim("new_positions", min=2, max=limits.max_seq_len)
        rows = Dim("wanted", min=1, max=limits.max_seq_len)
        dims = ({0: new}, {0: new}, {0: new}, None, None, {0: rows}, [None for _ in cached])
        return [
            ExportProgram("vision", Vision(model), (patches,), None),
            ExportProgram("read", Read(model), _arguments(model, 7, 2, cached), dims),
            ExportProgram("decode", Read(model), _arguments(model, 1, 1, cached), None),
        ]

    def model(
        self,
        config: ToyConfig,
        limits: ExportLimits,
        device: torch.device,
        dtype: torch.dtype,
        run: RunProgram,
        weights: Mapping[str, Tensor],
    ) -> ExportedToy:
        return ExportedToy(config, limits, torch.empty(0, device=device, dtype=dtype), run)


class Vision(nn.Module):
    def __init__(self, model: ToyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor) -> Tensor:
        return self.model.vision(patches)


class Read(nn.Module):
    """New tokens [N], and embeddings [N, E] in place of those where is_picture [N] says so."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: Tensor,
        embeddings: Tensor,
        is_picture: Tensor,
        starts: Tensor,
        inv_freq: Tensor,
        wanted: Tensor,
        cached: list[Tensor],
    ) -> Tensor:
        x = torch.where(is_picture[:, None], embeddings, self.model.embed(token_ids))
        pairs = list(zip(cached[::2], cached[1::2], strict=True))
        x = self.model.decode_steps(x, starts, inv_freq, pairs)
        return self.model.head(x[wanted])


def _arguments(model: ToyModel, count: int, wanted: int, cached: list[Tensor]) -> tuple:
    like = model.norm.weight
    ids = torch.arange(count, device=like.device)
    return (
        ids,
        like.new_zeros(count, model.config.hidden_size),
        ids < 0,
        ids[:1] + 4,
        like.new_ones(model.config.head_dim // 2, dtype=torch.float32),
        ids[:wanted],
        cached,
    )


class ExportedToy:
    """models.base.Model of programs, for one row. like: of their device and dtype."""

    def __init__(
        self, config: ToyConfig, limits: ExportLimits, like: Tensor, run: RunProgram
    ) -> None:
        self._config, self._limits, self._like, self._run = config, limits, like, run

    def new_cache(self, slots: int, positions: int) -> ToyCache:
        return ToyCache(self._config, slots, self._limits.max_seq_len, self._like)

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        yield media[:1]
        [patches] = media[0].tensors
        [embeddings] = self._run("vision", [patches.to(self._like)])
        own(cache).encoded[media[0].content_hash] = embeddings

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        rows, [row] = own(cache), batch.rows()
        batch.check(rows.lengths)
        if row.end > self._limits.max_seq_len:
            raise ContextLengthExceeded(f"exported for {self._limits.max_seq_len} positions")
        embeddings = self._like.new_zeros(row.count, self._config.hidden_size)
        is_picture = torch.zeros(row.count, dtype=torch.bool, device=self._like.device)
        if pictures := rows.pictures(batch):
            embeddings[pictures[0]], is_picture[pictures[0]] = pictures[1], True
        numbers: Sequence[Sequence[int]] = ([row.start], batch.wanted)
        starts, wanted = (torch.tensor(n, device=self._like.device) for n in numbers)
        arguments = [batch.token_ids, embeddings, is_picture, starts, rows.frequencies(row.slot)]
        cached = [tensor for layer in rows.layers for tensor in layer.row(row.slot)]
        name = "read" if row.count > 1 else "decode"
        [logits] = self._run(name, [*arguments, wanted, *cached])
        rows.advance(batch)
        return logits
