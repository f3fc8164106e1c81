"""Run a model as plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmchat.hardware.allocation import memory_errors
from mmchat.models.base import Batch, Cache, Model
from mmchat.models.prompt import Media


class EagerRuntime:
    """Calls the model's own methods; see mmchat.runtime.base.Runtime."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.notices: list[str] = []
        self.compile_seconds: float | None = None

    def new_cache(self, slots: int, positions: int) -> Cache:
        with memory_errors():
            return self.model.new_cache(slots, positions)

    @torch.inference_mode()  # entered by each next(): it does not hold for the caller in between
    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        with memory_errors():
            yield from self.model.encode(media, cache)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        with memory_errors():
            return self.model.forward(batch, cache)
