"""Tensors that a program holds, or makes when they are asked for, in place of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.checkpoints.checkpoint import Checkpoint, StoredAs, Used
from mmchat.checkpoints.mapped_file import TensorEntry

if TYPE_CHECKING:
    import torch


class InMemoryCheckpoint(Checkpoint):
    """A checkpoint in the Hub's format without files.

    shapes: of every tensor by its Hub name. dtype: of all of them, "bfloat16" or another.
    read: gives the tensor of a name; called once for each that a model needs.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        read: Callable[[str], torch.Tensor],
    ) -> None:
        place = Path("tensors in memory")
        self.format: StoredAs = "hf"
        self.files = (place,)
        self.entries = {
            name: TensorEntry(name, dtype, tuple(shape), place) for name, shape in shapes.items()
        }
        self.total_bytes = sum(entry.num_bytes for entry in self.entries.values())
        self._read = read

    def read(self, name: str, used: Used | None = None) -> torch.Tensor:  # noqa: ARG002
        return self._read(name)

    def release(self, name: str) -> None:
        """Nothing: the tensor belongs to whoever gave it."""

    def close(self) -> None:
        """Nothing is open."""
