"""The tensors of a loaded model in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.checkpoints.writers import Piece, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor, nn

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that no checkpoint stores included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int, int], None]
) -> None:
    """Write model.safetensors. wrote(bytes so far, bytes in all) is called for each tensor.

    Tensors that would leave the next one unaligned come last. Raises DiskError.
    """
    pieces = [_piece(name, tensor) for name, tensor in tensors.items()]
    pieces.sort(key=lambda piece: piece.num_bytes % _ALIGNMENT != 0)
    total = sum(piece.num_bytes for piece in pieces)
    done = 0

    def count(piece: Piece) -> None:
        nonlocal done
        done += piece.num_bytes
        wrote(done, total)

    write_safetensors(folder, pieces, total, count)


def _piece(name: str, tensor: Tensor) -> Piece:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Piece(name, dtype, tuple(tensor.shape), lambda: tensor.detach().cpu(), lambda: None)
