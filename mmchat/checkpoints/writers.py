"""Write the new files of a model's folder, each durable before it is closed.

Tensors go to safetensors files one at a time: memory holds one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mmchat.checkpoints.checkpoint import INDEX_NAME, SINGLE_NAME
from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.checkpoints.names import is_name, real_path
from mmchat.checkpoints.safetensors_file import DTYPES
from mmchat.errors import CheckpointError, disk_errors
from mmchat.progress import ProgressCallback
from mmchat.storage.safe_files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

_NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_PAPERS = ("LICENSE*", "USE_POLICY*")


def write_safetensors(
    folder: Path,
    entries: Sequence[TensorEntry],
    tensors: Iterable[Tensor],
    progress: ProgressCallback,
    max_shard_bytes: int | None = None,
) -> None:
    """Write model.safetensors, or shards of at most so many bytes and their index.

    entries: names, dtypes and shapes of what `tensors` gives, in its order. progress("writing the
    weights", bytes so far, bytes in all). Raises DiskError, and CheckpointError for another tensor.
    """
    total = sum(entry.num_bytes for entry in entries)
    shards = _shards(entries, max_shard_bytes or total)
    coming, done = iter(tensors), 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        with new_file(folder / name) as file:
            file.write(_header(shard))
            for entry in shard:
                _write_tensor(file, entry, next(coming))
                done += entry.num_bytes
                progress("writing the weights", done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


def _shards(entries: Sequence[TensorEntry], max_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards


def _header(entries: Sequence[TensorEntry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES_OF_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, entry: TensorEntry, tensor: Tensor) -> None:
    import torch

    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if (shape, dtype) != (entry.shape, entry.dtype):
        raise CheckpointError(
            f"tensor {shown(entry.name)}: expected {list(entry.shape)} {entry.dtype},"
            f" found {list(shape)} {dtype}"
        )
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that did not exist, open for writing; durable after the block. Raises DiskError."""
    with disk_errors(f"cannot write {shown(path)}"), path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file. Raises DiskError."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def papers_beside(checkpoint: Path) -> list[Path]:
    """The licence and use policy of a model's folder, each a file of it.

    Raises CheckpointError for one that is a link out of the folder.
    """
    place = checkpoint if checkpoint.is_dir() else checkpoint.parent
    root = place.resolve()
    found = [path for pattern in _PAPERS for path in sorted(place.glob(pattern))]
    return [path for path in found if is_name(path.name) and real_path(path, root).is_file()]


def copy_into(folder: Path, source: Path, limit: int, name: str | None = None) -> None:
    """Copy a regular file of at most `limit` bytes into a new, durable one.

    name: the new one's, else as it is called. Raises CheckpointError, DiskError.
    """
    try:
        opened = open_regular(source.resolve())
    except OSError as error:
        raise CheckpointError(f"{shown(source)}: cannot be read: {error.strerror}") from None
    with opened:
        if (size := os.fstat(opened.fileno()).st_size) > limit:
            raise CheckpointError(f"{shown(source)}: {size:,} bytes, at most {limit:,} are copied")
        with new_file(folder / (name or source.name)) as new:
            shutil.copyfileobj(opened, new)
