"""Read a prompt without answering it, for those who compare and measure models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmchat.models.base import Batch, cache_lacks

if TYPE_CHECKING:
    from mmchat.models.base import Cache, Model
    from mmchat.models.prompt import Prompt
    from mmchat.runtime.base import Runtime


def encode(runtime: Runtime | Model, prompt: Prompt, cache: Cache) -> None:
    """Begin `prompt` in the cache's first slot, and encode the pictures that it needs."""
    cache.begin(0, prompt)
    unread = prompt.unread(cache.lengths[0])
    while lacking := cache_lacks(cache, unread):
        for _ in runtime.encode(lacking, cache):
            pass


def rest_of(prompt: Prompt, cache: Cache, device: torch.device) -> Batch:
    """The positions of `prompt` that the cache's first slot does not hold."""
    start = cache.lengths[0]
    return Batch.last_of(torch.tensor(prompt.token_ids[start:], device=device), start)
