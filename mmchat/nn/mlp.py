"""The two feed-forward networks of transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmchat.nn.linear import Linear, fuse

# Positions that a CPU takes through an MLP at a time, so that what is between its layers stays in
# the cache: it takes a fifth less time than in whole tensors, whose memory is asked for anew.
PIECE = 512


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases. x: [..., E] -> [..., E].

    Source: Shazeer 2020, SwiGLU.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

        self.gate_up_proj: nn.Module | None = None

    def fuse_projections(self) -> None:
        """Read gate and up in one product; `gate_proj` and `up_proj` go."""
        fuse(self, ("gate_proj", "up_proj"), "gate_up_proj")

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with biases and the exact (erf) GELU. x: [..., E] -> [..., E]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > PIECE and x.is_cpu and not torch.compiler.is_compiling():
            return torch.cat([self.forward(piece) for piece in x.split(PIECE, -2)], -2)
        return self.fc2(F.gelu(self.fc1(x)))
