"""The tensors of a loaded model in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.checkpoints.mapped_file import TensorEntry
from mmchat.checkpoints.writers import write_safetensors
from mmchat.progress import ProgressCallback

if TYPE_CHECKING:
    from torch import Tensor, nn

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that no checkpoint stores included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], progress: ProgressCallback) -> None:
    """Write model.safetensors. progress("writing the weights", bytes so far, bytes in all).

    Tensors that would leave the next one unaligned come last. Raises DiskError.
    """
    entries = [
        TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), folder)
        for name, tensor in tensors.items()
    ]
    entries.sort(key=lambda entry: entry.num_bytes % _ALIGNMENT != 0)
    write_safetensors(
        folder, entries, (tensors[entry.name].detach().cpu() for entry in entries), progress
    )
