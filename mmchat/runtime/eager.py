"""Run a model as plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmchat.hardware.allocation import memory_error
from mmchat.models.base import Cache, ModelInputs, VisionLanguageModel


class EagerRuntime:
    """Calls the model's own methods; see mmchat.runtime.base.Runtime."""

    def __init__(self, model: VisionLanguageModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.notices: list[str] = []
        self.compile_seconds: float | None = None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        with memory_errors():
            return self.model.new_cache(batch, capacity)

    def encode_images(self, inputs: ModelInputs, cache: Cache) -> int:
        with memory_errors():
            return self.model.encode_images(inputs, cache)

    def prefill(self, inputs: ModelInputs, cache: Cache) -> Tensor:
        with memory_errors():
            return self.model.prefill(inputs, cache)

    def decode(self, token_ids: Tensor, cache: Cache) -> Tensor:
        with memory_errors():
            return self.model.decode(token_ids, cache)

    def verify(self, token_ids: Tensor, cache: Cache) -> Tensor:
        with memory_errors():
            return self.model.verify(token_ids, cache)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an allocator's failure into MemoryError_ with the next step."""
    try:
        yield
    except Exception as error:
        out_of_memory = memory_error(error)
        if out_of_memory is None:
            raise
        try:
            raise out_of_memory from None
        finally:
            del out_of_memory  # it would hold this frame, which would hold it
