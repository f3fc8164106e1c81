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

    @torch.inference_mode(False)  # tensors of one kind, whoever makes them: see torch.compile
    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions; what is stored stays, also if memory runs out."""
        if capacity > self.capacity:
            self._move(capacity)

    def shrink(self, capacity: int) -> None:
        """Give back the room beyond `capacity` positions."""
        if capacity < self.capacity:
            self._move(capacity)

    def _move(self, capacity: int) -> None:
        kept = min(capacity, self.capacity)
        shape = (*self.key.shape[:2], capacity, self.key.shape[3])
        key, value = self.key.new_zeros(shape), self.value.new_zeros(shape)
        key[:, :, :kept] = self.key[:, :, :kept]
        value[:, :, :kept] = self.value[:, :, :kept]
        self.key, self.value = key, value
