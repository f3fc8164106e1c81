"""Rotary position embedding with Llama 3's frequency scaling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i in 0..D/2, float32 [D/2]. Source: Su et al. 2021, eq. 15."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def scale_llama3(
    inv_freq: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Stretch the long wavelengths for a longer context.

    inv_freq: [D/2] -> [D/2]. Of the original positions, wavelengths below 1/high_freq_factor stay,
    those above 1/low_freq_factor are stretched by `factor`, those between are blended.
    Source: Llama 3.1 model card, rope_type "llama3".
    """
    original = original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    mixed = (1 - blend) * inv_freq / factor + blend * inv_freq
    stretched = torch.where(wavelength > original / low_freq_factor, inv_freq / factor, mixed)
    return torch.where(wavelength < original / high_freq_factor, inv_freq, stretched)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles at given positions.

    positions: [N] integers -> cos, sin: [N, 1, D] float32, both halves of D alike (the Hub's
    layout, in which dimension i is paired with i + D/2). scaling: arguments of scale_llama3.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        with torch.device("cpu"):  # computed, not loaded: they have values on the meta device too
            inv_freq = inverse_frequencies(head_dim, theta)
            if scaling is not None:
                inv_freq = scale_llama3(inv_freq, **scaling)
            self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return turns(positions, self.inv_freq)


def turns(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as of RotaryEmbedding; inv_freq: [D/2] or, for each position, [N, D/2]."""
    angles = (positions[:, None].float() * inv_freq)[:, None]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of x by its position's angle, in float32.

    x: [N, H, D], cos, sin: [N, 1, D] -> [N, H, D] in x's dtype.
    """
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
