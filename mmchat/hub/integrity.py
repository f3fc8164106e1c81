"""Compare the files of a model with what was recorded of them: sizes, hashes, finite numbers."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.manifest import Manifest, read_manifest
from mmchat.checkpoints.names import ETAG, is_name, is_path, open_inside
from mmchat.errors import CheckpointError, quoted
from mmchat.hub.places import manifest_path_of
from mmchat.hub.transfer import new_digest
from mmchat.strict_json import Where, read_bounded

CHECKLIST_NAME = "checklist.chk"
_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](.+)")
_BLOCK = 1 << 20

# progress(file, bytes that were read)
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Fault:
    """A file, by its path in the folder, and what is wrong with it."""

    file: str
    reason: str


@dataclass(frozen=True)
class Expected:
    """What a record says of a file. make: gives the hash object; hex: its result."""

    file: str
    record: str
    size: int | None
    make: Callable[[int], Any]
    hex: str


@dataclass(frozen=True)
class Verification:
    """records: what the files were compared with. bytes: of the files compared."""

    folder: Path
    records: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    faults: tuple[Fault, ...]


def verify_folder(
    folder: Path, *, fast: bool = False, progress: Progress | None = None
) -> Verification:
    """Compare the files with the manifest, the names the Hub's cache gives them, and Meta's list.

    fast: sizes only. Raises CheckpointError when there is nothing to compare with.
    """
    expected, faults = _expectations(folder)
    if not expected and not faults:
        raise CheckpointError(
            f"{quoted(folder, 300)}: no manifest and no {CHECKLIST_NAME} says what should be there"
        )
    sizes: dict[str, int] = {}
    for item in expected:
        reason = _fault(folder, item, fast, sizes, progress or (lambda *_: None))
        if reason and all(fault.file != item.file for fault in faults):
            faults.append(Fault(item.file, reason))
    records = tuple(dict.fromkeys(item.record for item in expected))
    files = tuple(dict.fromkeys(item.file for item in expected))
    return Verification(folder, records, files, sum(sizes.values()), tuple(faults))


def recorded_sizes(folder: Path) -> dict[str, int]:
    """The bytes that `verify_folder` will read, by file. Raises CheckpointError."""
    sizes = {}
    for item in _expectations(folder)[0]:
        with suppress(CheckpointError, OSError), open_inside(folder, item.file) as opened:
            sizes[item.file] = os.fstat(opened.fileno()).st_size
    return sizes


def _expectations(folder: Path) -> tuple[list[Expected], list[Fault]]:
    path = manifest_path_of(folder)
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        faults = [Fault(path.name, "the record itself is damaged")]
        return [*_by_blob_names(folder), *_by_checklists(folder, None)], faults
    if manifest is None:
        return [*_by_blob_names(folder), *_by_checklists(folder, None)], []
    return [*_by_manifest(manifest), *_by_checklists(folder, manifest)], []


def _by_manifest(manifest: Manifest) -> Iterator[Expected]:
    for name, record in manifest.files.items():
        yield Expected(name, "manifest", record.size, lambda _: hashlib.sha256(), record.sha256)


def _by_blob_names(folder: Path) -> Iterator[Expected]:
    """In the Hub's cache a file is a link to a blob that is named by its hash."""
    if folder.parent.name != "snapshots":
        return
    for path in sorted(folder.rglob("*")):
        etag = path.readlink().name if path.is_symlink() else ""
        name = path.relative_to(folder).as_posix()
        if ETAG.fullmatch(etag) and is_path(name):
            yield Expected(
                name, "names in the cache", None, lambda size, e=etag: new_digest(e, size), etag
            )


def _by_checklists(folder: Path, manifest: Manifest | None) -> Iterator[Expected]:
    """MD5 sums that Meta sends beside its weights."""
    for path in (folder / CHECKLIST_NAME, folder / "original" / CHECKLIST_NAME):
        if not path.is_file():
            continue
        where = Where(str(path), error=CheckpointError)
        text = read_bounded(path, limits.CONFIG_JSON_BYTES, where).decode("utf-8", "replace")
        for line in filter(None, map(str.strip, text.splitlines())):
            match = _CHECKLIST_LINE.fullmatch(line)
            if match is None or not is_name(match[2]):
                raise where.fail(f"{quoted(line)} is not an MD5 sum and a file name")
            name = (path.parent / match[2]).relative_to(folder).as_posix()
            if manifest is None or name in manifest.files:
                yield Expected(name, CHECKLIST_NAME, None, _md5, match[1])


def _md5(_size: int) -> Any:
    return hashlib.md5(usedforsecurity=False)


def _fault(
    folder: Path, item: Expected, fast: bool, sizes: dict[str, int], progress: Progress
) -> str | None:
    """What is wrong with one file, or None; notes its size in `sizes`."""
    try:
        with open_inside(folder, item.file) as opened:
            size = sizes[item.file] = os.fstat(opened.fileno()).st_size
            if item.size is not None and size != item.size:
                return f"has {size:,} bytes, {item.size:,} are recorded"
            if fast:
                return None
            digest = item.make(size)
            while block := opened.read(_BLOCK):
                digest.update(block)
                progress(item.file, len(block))
    except FileNotFoundError:
        return "is missing"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if digest.hexdigest() == item.hex:
        return None
    return f"its content is not what was recorded ({item.record})"


def non_finite(checkpoint: Checkpoint) -> Iterator[Fault]:
    """A Fault for each tensor that holds NaN or infinity; reads all tensors."""
    import torch

    for name, entry in checkpoint.entries.items():
        tensor = checkpoint.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            reason = f"tensor {quoted(name)} holds {count:,} NaN or infinite values"
            yield Fault(entry.file.name, reason)
        del tensor
        checkpoint.release(name)
