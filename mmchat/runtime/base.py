"""What runs a model: the engine calls these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.models.base import Cache, ModelInputs


class Runtime(Protocol):
    """A loaded model, ready to read and write. Raises MemoryError_ when memory runs out."""

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

    def new_cache(self, batch: int, capacity: int) -> Cache: ...

    def encode_images(self, inputs: ModelInputs, cache: Cache) -> int:
        """Encode the pictures that the cache does not hold; how many there were."""
        ...

    def prefill(self, inputs: ModelInputs, cache: Cache) -> Tensor:
        """Read new positions; float32 logits [B, V] of each row's last one."""
        ...

    def decode(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """Read one token a row, token_ids: [B, 1]; float32 logits [B, V]."""
        ...

    def verify(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """Read a few more tokens a row, token_ids: [B, S]; float32 logits [B, S, V] of all.

        Cheap for small S: it is how drafted tokens are checked. None is an image token.
        """
        ...
