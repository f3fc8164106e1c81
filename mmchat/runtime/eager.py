"""Run a model as plain PyTorch."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmchat.errors import MemoryError_
from mmchat.models.base import Cache, ModelInputs, VisionLanguageModel


class EagerRuntime:
    """Calls the model's own methods; see mmchat.runtime.base.Runtime."""

    def __init__(self, model: VisionLanguageModel, device: torch.device) -> None:
        self.model = model
        self.device = device

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


# What allocators and libraries say in a plain RuntimeError: that of the CPU, MPS, oneDNN, cuBLAS.
_NO_MEMORY = ("can't allocate memory", "out of memory", "out_of_memory", "STATUS_ALLOC_FAILED")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an allocator's failure into MemoryError_ with the next step.

    What the failed work had taken is free again when the error reaches the caller.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_plain = not isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_plain and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        # The frames of the error would keep their tensors for as long as somebody keeps the error.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise MemoryError_(
            "out of memory while running the model; use a shorter context (--max-seq-len), a"
            " smaller dtype or --quantize int4, or another device"
        ) from None
