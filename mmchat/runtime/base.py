"""What runs a model: the engine calls these and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.models.base import Batch, Cache
    from mmchat.models.prompt import Media


class Runtime(Protocol):
    """A loaded model, ready to read and write; its calls are those of models.base.Model.

    They raise MemoryError_ when memory runs out.
    """

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

    def new_cache(self, slots: int, positions: int) -> Cache: ...

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]: ...

    def forward(self, batch: Batch, cache: Cache) -> Tensor: ...
