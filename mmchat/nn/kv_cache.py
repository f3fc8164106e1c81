"""Keys and values of past positions."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Preallocated keys and values of one self-attention layer: two tensors [B, G, L, D]."""

    def __init__(
        self, batch: int, groups: int, capacity: int, head_dim: int, **options: object
    ) -> None:
        self.key = torch.zeros(batch, groups, capacity, head_dim, **options)  # type: ignore[arg-type]
        self.value = torch.zeros_like(self.key)

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    def write_span(self, start: int, key: Tensor, value: Tensor) -> None:
        """Store key, value: [B, G, S, D] at positions start .. start + S."""
        end = start + key.shape[2]
        self.key[:, :, start:end] = key
        self.value[:, :, start:end] = value

    def shrink(self, capacity: int) -> None:
        """Move to smaller tensors; what is stored beyond `capacity` is lost."""
        if capacity >= self.capacity:
            return
        key, value = (t[:, :, :capacity].clone() for t in (self.key, self.value))
        self.key, self.value = key, value

    def grow(self, capacity: int) -> None:
        """Move to larger tensors; what is stored stays."""
        if capacity <= self.capacity:
            return
        for name in ("key", "value"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)
