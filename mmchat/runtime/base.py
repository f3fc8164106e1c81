"""What runs a model: the engine calls these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mmchat.models.base import Model

if TYPE_CHECKING:
    import torch


class Runtime(Model, Protocol):
    """A loaded model, ready to read and write; MemoryError_ when memory runs out."""

    @property
    def device(self) -> torch.device: ...

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know of how the model runs, such as why it is not compiled."""
        ...

    @property
    def compile_seconds(self) -> float | None:
        """How long compiling took; None if the model runs as plain PyTorch."""
        ...
