"""Reads prompts with a model whose pictures take positions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmchat.models.base import Batch, Cache, Model
from mmchat.models.prompt import Prompt


def encode(model: Model, prompt: Prompt, cache: Cache, slot: int = 0) -> None:
    """Encode the pictures that the slot has not read to their ends."""
    for media in prompt.unread(cache.lengths[slot]):
        if not cache.has_media(media.content_hash):
            for _ in model.encode([media], cache):
                pass


def read(model: Model, cache: Cache, prompt: Prompt, slot: int = 0, piece: int = 2000) -> Tensor:
    """Logits [N, V] of all positions that the slot does not hold, read piece by piece."""
    cache.begin(slot, prompt)
    encode(model, prompt, cache, slot)
    ids = torch.tensor(prompt.token_ids)
    starts = range(cache.lengths[slot], len(ids), piece)
    return torch.cat(
        [model.forward(Batch.all_of(ids[s : s + piece], s, slot), cache) for s in starts]
    )
