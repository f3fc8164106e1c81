"""A checkpoint on disk: a file or a folder, of Hugging Face in safetensors or older .bin files, of
Meta in .pth files, or of Ollama in GGUF. Of .bin and .pth only offsets are read; nothing is
unpickled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

from mmchat import limits
from mmchat.checkpoints import pth_file, safetensors_file
from mmchat.checkpoints.foreign import explain_foreign
from mmchat.checkpoints.gguf_file import gguf_at, is_gguf
from mmchat.checkpoints.mapped_file import MappedFile, TensorEntry, shown
from mmchat.checkpoints.names import is_name, real_path
from mmchat.checkpoints.stored_names import buffers_remark, model_names
from mmchat.errors import CheckpointError
from mmchat.strict_json import Where, nearest, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.checkpoints.computed import Computed, PackedWeight

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
StoredAs = Literal["hf", "meta", "gguf"]  # whose names and layouts the tensors have
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_SINGLE_NAME = "pytorch_model.bin"
# 0 or 1: shards are joined along this axis; None: every shard holds the whole tensor.
MergeRules = Callable[[str], Literal[0, 1] | None]
# What is used of a tensor: an axis, and (first, end) of each stretch along it.
Used = tuple[int, Sequence[tuple[int, int]]]
Parts = dict[str, list[tuple[MappedFile, TensorEntry]]]  # the pieces of a tensor, file by file

_SHARDS = {  # and the index that names them
    re.compile(r".+-\d{5}-of-\d{5}\.safetensors"): INDEX_NAME,
    re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"): BIN_INDEX_NAME,
}
_META_SHARD = re.compile(r"consolidated\.(\d{2})\.pth")
_ZIPS = (".pth", ".bin", ".pt", ".ckpt")  # of tensors, as torch.save writes them
_PICKLES = (".pkl", ".pickle")
# What the embedding is called, by which the two formats are told apart.
_META_EMBEDDING, _HUB_EMBEDDING = "tok_embeddings.", "embed_tokens."


class Checkpoint:
    """The tensors of one model by name. Headers are read at once, data only when asked for.

    entries: by the model's own names (see stored_names), in the order of the files; where Meta's
    shards are joined, with the joined shape. remarks: one line each, what was passed over.
    """

    remarks: tuple[str, ...] = ()
    computed: Mapping[str, Computed | PackedWeight] = MappingProxyType(
        {}
    )  # of the entries, those not stored so

    def __init__(
        self,
        format: StoredAs,
        files: list[MappedFile],
        parts: Parts,
        axes: Mapping[str, int],
        buffers: list[str],
    ) -> None:
        self.format: StoredAs = format
        self.remarks = (buffers_remark(buffers),) if buffers else ()
        self._files = files
        self._parts = parts
        self._axes = axes
        self.files = tuple(file.path for file in files)
        self.total_bytes = sum(file.size for file in files)
        self.entries: Mapping[str, TensorEntry] = {
            name: _joined([entry for _, entry in shards], axes.get(name))
            for name, shards in parts.items()
        }

    def read(self, name: str, used: Used | None = None) -> Tensor:
        """The tensor `name` on the CPU: a view of the file, or a copy where shards are joined.

        A view can be written to without changing the file; `release` forgets what was written.
        used: shards with nothing of it are not read, and anything stands in their place.
        """
        (file, first), *others = self._parts[name]
        if not others:
            return file.tensor(first)
        import torch

        axis, end = self._axes[name], 0
        spans = used[1] if used and used[0] == axis else [(0, self.entries[name].shape[axis])]
        whole = torch.empty(self.entries[name].shape, dtype=getattr(torch, first.dtype))
        for file, entry in self._parts[name]:
            begin, end = end, end + entry.shape[axis]
            if any(one < end and begin < other for one, other in spans):
                whole.narrow(axis, begin, end - begin).copy_(file.tensor(entry))
        return whole

    def rows(self, name: str) -> Tensor:
        """`read`, for those who take all rows of a matrix once, a slice after the other."""
        return self.read(name)

    def bytes_by_kind(self) -> dict[str, int]:
        """What the tensors take in the files, by their kind of numbers."""
        found: Counter[str] = Counter()
        for entry in self.entries.values():
            found[entry.dtype] += entry.num_bytes
        return dict(found)

    def release(self, name: str) -> None:
        """Return the pages of `name` to the system; using the tensor again reads them again."""
        for file, entry in self._parts[name]:
            file.release(entry)

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_companion(own: Checkpoint, companion: Checkpoint, prefix: str) -> Checkpoint:
    """Both as one, with `prefix` in front of the companion's names. It closes both."""
    parts = own._parts | {
        prefix + name: [(file, replace(entry, name=prefix + name)) for file, entry in pieces]
        for name, pieces in companion._parts.items()
    }
    joined = Checkpoint(own.format, own._files + companion._files, parts, own._axes, [])
    joined.remarks = own.remarks + companion.remarks
    return joined


def _joined(entries: list[TensorEntry], axis: int | None) -> TensorEntry:
    first = entries[0]
    if axis is None:
        return first
    shape = list(first.shape)
    shape[axis] = sum(entry.shape[axis] for entry in entries)
    return replace(first, shape=tuple(shape))


def open_checkpoint(path: Path | str, *, merge_rules: MergeRules | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, a folder or one of its files; loads no tensor.

    merge_rules says how the shards of Meta's larger models are joined. Raises CheckpointError.
    """
    chosen = _choose(Path(path).expanduser())
    files: list[MappedFile] = []
    try:
        if is_gguf(chosen[0]):
            from mmchat.checkpoints.gguf_checkpoint import open_gguf

            return open_gguf(Path(path).expanduser())
        if len(chosen) > 1:
            files += map(MappedFile, chosen)
            return _open_meta(files, merge_rules)
        if chosen[0].suffix == ".json":
            return _open_index(chosen[0], files)
        files.append(MappedFile(chosen[0]))
        return _by_names(files, _collect(files))
    except BaseException:
        for file in files:
            file.close()
        raise


def is_stored_in_gguf(path: Path) -> bool:
    """Whether `open_checkpoint` would open GGUF at `path`, by the first bytes."""
    with suppress(CheckpointError):  # opening says what is wrong
        return is_gguf(_choose(path.expanduser())[0])
    return False


# Which files


def _choose(path: Path) -> list[Path]:
    try:
        return _files_in(path) if path.is_dir() else _files_of(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the name is not valid"
        raise CheckpointError(f"{shown(path)}: cannot be read: {reason}") from None


def _files_in(folder: Path) -> list[Path]:
    """The index, the single safetensors file, or Meta's files of a folder or its original/."""
    root = folder.resolve()
    for name in (INDEX_NAME, SINGLE_NAME):
        if _exists(folder / name):
            return [_inside(folder / name, root)]
    for place in (folder, folder / "original"):
        if place.is_dir() and (found := sorted(place.glob("consolidated*.pth"))):
            return [_inside(file, root) for file in _ranks(found)]
    for name in (BIN_INDEX_NAME, BIN_SINGLE_NAME):
        if _exists(folder / name):
            return [_inside(folder / name, root)]
    if found := gguf_at(folder):
        return [_inside(file, root) for file in found]
    raise CheckpointError(f"{shown(folder)}: {_explain_nothing(folder)}")


def _explain_nothing(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    wanted = (
        f"{SINGLE_NAME}, {INDEX_NAME} with its shards, consolidated*.pth, *.gguf, or"
        f" {BIN_SINGLE_NAME} or {BIN_INDEX_NAME} with its shards"
    )
    for pattern, index in _SHARDS.items():
        if shards := list(filter(pattern.fullmatch, names)):
            return f"holds {shown(shards[0])} but no {index}; download that as well"
    if foreign := explain_foreign(names):
        return foreign
    if files := [name for name in names if name.endswith((".safetensors", *_ZIPS))]:
        return f"needs {wanted}; if {shown(files[0])} holds the weights, give --checkpoint-path it"
    found = f"holds {', '.join(map(shown, names[:5]))}" if names else "is empty"
    return f"{found}; needs {wanted}"


def _files_of(path: Path) -> list[Path]:
    """A file that the user names; one of a set of shards stands for the set."""
    if not _exists(path):
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(
            f"{shown(path)}: no such file or folder{nearest(path.name, siblings)}"
        )
    if is_gguf(path):
        return [path]
    for pattern, index in _SHARDS.items():
        if pattern.fullmatch(path.name) and _exists(path.parent / index):
            return [path.parent / index]
    if path.name.endswith(_PICKLES):
        raise CheckpointError(
            f"{shown(path)}: files ending in {path.suffix} are pickles that may run code when read;"
            " use the model's .safetensors or consolidated*.pth"
        )
    if _META_SHARD.fullmatch(path.name):
        return _ranks(sorted(path.parent.glob("consolidated.*.pth")))
    if path.name.endswith((".safetensors", ".index.json", *_ZIPS)):
        return [path]
    if foreign := explain_foreign([path.name]):
        raise CheckpointError(f"{shown(path)}: {foreign}")
    raise CheckpointError(
        f"{shown(path)}: mmchat reads .safetensors, consolidated*.pth, GGUF, and .bin, .pt or"
        " .ckpt that hold tensors alone"
    )


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _ranks(found: list[Path]) -> list[Path]:
    """Meta's shards in the order of their numbers, none missing between; or the single file."""
    ranks = {int(match[1]): file for file in found if (match := _META_SHARD.fullmatch(file.name))}
    if not ranks:
        return found[:1]
    if missing := [rank for rank in range(max(ranks)) if rank not in ranks]:
        names = ", ".join(f"consolidated.{rank:02d}.pth" for rank in missing[:8])
        raise CheckpointError(f"{shown(found[0].parent)}: missing {names}; download it as well")
    return [ranks[rank] for rank in sorted(ranks)]


def _inside(path: Path, root: Path) -> Path:
    """`path`, if the file behind it is one of the model's."""
    real_path(path, root)
    return path


# Hugging Face


def _open_index(index: Path, files: list[MappedFile]) -> Checkpoint:
    """Open the shards that an index names; `files` takes them, to be closed by the caller."""
    where = Where(str(index), error=CheckpointError)
    content: Any = read_json(index, where, limits.INDEX_JSON_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise where.fail("no weight_map: it is not the index of a sharded checkpoint")
    ending = ".bin" if index.name.endswith(".bin.index.json") else ".safetensors"
    for name, shard in weight_map.items():
        if not is_name(shard) or not shard.endswith(ending):
            raise where.fail(
                f"tensor {shown(name)} is said to be in {shown(shard)}, which is no plain name of a"
                f" {ending} file"
            )
    names = sorted(set(weight_map.values()))
    root = index.parent.resolve()
    missing = [name for name in names if not _exists(index.parent / name)]
    if missing:
        listed = ", ".join(map(shown, missing[:10]))
        raise where.fail(
            f"{len(missing)} of {len(names)} shards are missing: {listed}; download them"
        )
    for name in names:
        files.append(MappedFile(_inside(index.parent / name, root)))
    parts = _collect(files)
    for name, shard in weight_map.items():
        if name not in parts or parts[name][0][1].file.name != shard:
            raise where.fail(f"tensor {shown(name)} is not in {shown(shard)}; download both again")
    return _by_names(files, parts)


def _by_names(files: list[MappedFile], stored: Parts) -> Checkpoint:
    """Of the format that the names tell, or else the file's. stored: by the names in the files."""
    names, buffers = model_names(stored)
    is_meta = any(_META_EMBEDDING in own for own in names.values())
    is_hub = any(_HUB_EMBEDDING in own for own in names.values())
    format = "meta" if is_meta or (not is_hub and files[0].path.suffix == ".pth") else "hf"
    parts = {
        own: [(file, replace(entry, name=own)) for file, entry in stored[name]]
        for name, own in names.items()
    }
    return Checkpoint(format, files, parts, {}, buffers)


def _collect(files: list[MappedFile]) -> Parts:
    parts: Parts = {}
    for file in files:
        reader = pth_file if file.path.suffix in _ZIPS else safetensors_file
        for entry in reader.read_entries(file):
            if entry.name in parts:
                other = parts[entry.name][0][1].file.name
                raise file.error(f"tensor {shown(entry.name)} is also in {shown(other)}")
            parts[entry.name] = [(file, entry)]
    return parts


# Meta


def _open_meta(files: list[MappedFile], merge_rules: MergeRules | None) -> Checkpoint:
    shards = [{entry.name: entry for entry in pth_file.read_entries(file)} for file in files]
    if len(files) > 1 and merge_rules is None:
        raise files[0].error(f"one of {len(files)} shards, and no rule says how to join them")
    first = shards[0]
    for file, shard in zip(files, shards, strict=True):
        if odd := sorted(first.keys() ^ shard.keys()):
            raise file.error(
                f"tensor {shown(odd[0])} is in only one of it and {shown(files[0].path.name)};"
                " the files belong to different models or one is damaged"
            )
    parts: Parts = {}
    axes: dict[str, int] = {}
    names, buffers = model_names(first)
    for stored, name in names.items():
        entry = first[stored]
        pieces = [
            (file, replace(shard[stored], name=name))
            for file, shard in zip(files, shards, strict=True)
        ]
        axis = merge_rules(name) if merge_rules and len(files) > 1 else None
        for file, piece in pieces:
            if (piece.shape, piece.dtype) != (entry.shape, entry.dtype):
                raise file.error(
                    f"tensor {shown(name)} is {list(piece.shape)} {piece.dtype}, but"
                    f" {list(entry.shape)} {entry.dtype} in {shown(files[0].path.name)}"
                )
        if axis is not None and axis >= len(entry.shape):
            raise files[0].error(f"tensor {shown(name)}: {list(entry.shape)} cannot be joined")
        parts[name] = pieces if axis is not None else pieces[:1]
        if axis is not None:
            axes[name] = axis
    return Checkpoint("meta", files, parts, axes, buffers)
