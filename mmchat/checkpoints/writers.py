"""Write tensors to safetensors and .pth files, one at a time: memory holds one of them.

The files are new, and made durable before they are closed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mmchat.checkpoints.checkpoint import INDEX_NAME, SINGLE_NAME
from mmchat.checkpoints.mapped_file import ITEM_BYTES, shown
from mmchat.checkpoints.names import is_name, real_path
from mmchat.errors import CheckpointError, DiskError
from mmchat.storage.safe_files import open_regular

if TYPE_CHECKING:
    import torch

_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_PAPERS = ("LICENSE*", "USE_POLICY*")
_ALIGNMENT = 64  # of the data in a .pth, as torch.save has it
_LOCAL_HEADER = 30 + 20  # of a zip member: fixed part and sizes of 64 bits
_PADDING_TAG = 0x4246  # "FB": torch's name for the padding


@dataclass(frozen=True)
class Piece:
    """A tensor to be written. make: computes it. done: called after it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    done: Callable[[], None]

    @property
    def num_bytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * ITEM_BYTES[self.dtype]


def write_safetensors(
    folder: Path, pieces: Sequence[Piece], max_shard_bytes: int, wrote: Callable[[Piece], None]
) -> list[Path]:
    """Write model.safetensors, or shards and their index. Raises DiskError, CheckpointError."""
    shards = _shards(pieces, max_shard_bytes)
    if len(shards) == 1:
        path = folder / SINGLE_NAME
        _write_shard(path, shards[0], wrote)
        return [path]
    paths, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        paths.append(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        _write_shard(paths[-1], shard, wrote)
        weight_map |= {piece.name: paths[-1].name for piece in shard}
    total = sum(piece.num_bytes for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, index)
    return [*paths, folder / INDEX_NAME]


def _shards(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(piece)
        room -= piece.num_bytes
    return shards


def _write_shard(path: Path, pieces: Sequence[Piece], wrote: Callable[[Piece], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.num_bytes
        header[piece.name] = {
            "dtype": _SAFETENSORS_DTYPES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _new_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            _write_tensor(file, piece)
            wrote(piece)


def write_pth(path: Path, pieces: Sequence[Piece], wrote: Callable[[Piece], None]) -> None:
    """Write a file that `torch.load` reads as a dict of tensors. Raises DiskError."""
    with _new_file(path) as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("consolidated/data.pkl", _pickled(pieces))
        archive.writestr("consolidated/byteorder", "little")
        for key, piece in enumerate(pieces):
            info = zipfile.ZipInfo(f"consolidated/data/{key}")
            before = raw.tell() + _LOCAL_HEADER + len(info.filename) + 4
            padding = -before % _ALIGNMENT
            info.extra = struct.pack("<HH", _PADDING_TAG, padding) + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                _write_tensor(member, piece)
            wrote(piece)
        archive.writestr("consolidated/version", "3\n")


class _Storage:
    def __init__(self, key: int, piece: Piece) -> None:
        self.key, self.piece = str(key), piece


class _Tensor:
    """Pickles as a tensor that fills a storage of its own."""

    def __init__(self, key: int, piece: Piece) -> None:
        self.storage = _Storage(key, piece)

    def __reduce__(self) -> tuple[Any, ...]:
        from torch import _utils

        shape = self.storage.piece.shape
        strides = [1]
        for length in reversed(shape[1:]):
            strides.insert(0, strides[0] * length)
        stride = tuple(strides[: len(shape)])
        arguments = (self.storage, 0, shape, stride, False, OrderedDict())
        return _utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        import torch

        kind = getattr(torch, _STORAGES[obj.piece.dtype])
        count = obj.piece.num_bytes // ITEM_BYTES[obj.piece.dtype]
        return "storage", kind, obj.key, "cpu", count


def _pickled(pieces: Sequence[Piece]) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump({p.name: _Tensor(key, p) for key, p in enumerate(pieces)})
    return out.getvalue()


def _write_tensor(file: Any, piece: Piece) -> None:
    import torch

    tensor = piece.make()
    found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != (piece.shape, piece.dtype):
        raise CheckpointError(
            f"tensor {shown(piece.name)}: expected {list(piece.shape)} {piece.dtype},"
            f" found {list(found[0])} {found[1]}"
        )
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    piece.done()


class _new_file:  # noqa: N801
    """A file that did not exist, durable when closed; OSError becomes DiskError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> BinaryIO:
        try:
            self._file = self._path.open("xb")
        except OSError as error:
            raise self._disk_error(error) from None
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as problem:
            raise self._disk_error(problem) from None
        if isinstance(error, OSError):
            raise self._disk_error(error) from None

    def _disk_error(self, error: OSError) -> DiskError:
        return DiskError(f"cannot write {shown(self._path)}: {error.strerror or error}")


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
        write_new(folder / (name or source.name), lambda new: shutil.copyfileobj(opened, new))


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file. Raises DiskError."""
    with _new_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_new(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a new file by `write`, which gets it open. Raises DiskError."""
    with _new_file(path) as file:
        write(file)
