"""Compare the files of a model with what was recorded of them: sizes, hashes, finite numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmchat import limits
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.manifest import Manifest, read_manifest
from mmchat.checkpoints.names import ETAG, is_name, is_path, open_inside
from mmchat.errors import CheckpointError, quoted
from mmchat.hub.places import place_at
from mmchat.hub.transfer import feed, new_digest
from mmchat.progress import BytesCallback
from mmchat.strict_json import Where, read_bounded

CHECKLIST_NAME = "checklist.chk"
_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](.+)")


@dataclass(frozen=True)
class Fault:
    """A file, by its path in the folder, and what is wrong with it."""

    file: str
    reason: str


@dataclass(frozen=True)
class _Expected:
    """What a record says of a file: its hash, and its size unless the record has none."""

    file: str
    record: str
    hash: str
    size: int | None = None


@dataclass(frozen=True)
class Verification:
    """records: what the files were compared with. bytes: of the files compared."""

    folder: Path
    records: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    faults: tuple[Fault, ...]


def verify_folder(
    folder: Path, *, fast: bool = False, progress: BytesCallback = lambda *_: None
) -> Verification:
    """Compare the files with the manifest, the names the Hub's cache gives them, and Meta's list.

    fast: sizes only. Raises CheckpointError when there is nothing to compare with.
    """
    expected, faults = _expectations(folder)
    if not expected and not faults:
        raise CheckpointError(
            f"{quoted(folder, 300)}: no manifest and no {CHECKLIST_NAME} says what should be there"
        )
    for item in expected:
        digest, told = None if fast else item.hash, partial(progress, item.file)
        reason = fault_of(folder, item.file, item.size, digest, told)
        if reason and all(fault.file != item.file for fault in faults):
            faults.append(Fault(item.file, reason))
    records = tuple(dict.fromkeys(item.record for item in expected))
    files = tuple(dict.fromkeys(item.file for item in expected))
    return Verification(folder, records, files, sum(_sizes(folder, files).values()), tuple(faults))


def recorded_sizes(folder: Path) -> dict[str, int]:
    """The bytes that `verify_folder` will read, by file. Raises CheckpointError."""
    return _sizes(folder, [item.file for item in _expectations(folder)[0]])


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    sizes = {}
    for name in names:
        with suppress(CheckpointError, OSError), open_inside(folder, name) as opened:
            sizes[name] = os.fstat(opened.fileno()).st_size
    return sizes


def _expectations(folder: Path) -> tuple[list[_Expected], list[Fault]]:
    path = place_at(folder).manifest_path
    manifest, faults = None, []
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        faults = [Fault(path.name, "the record itself is damaged")]
    recorded = manifest.files.items() if manifest else ()
    known = [_Expected(name, "manifest", r.sha256, r.size) for name, r in recorded]
    if manifest is None:
        known += _by_blob_names(folder)
    return [*known, *_by_checklists(folder, manifest)], faults


def _by_blob_names(folder: Path) -> Iterator[_Expected]:
    """In the Hub's cache a file is a link to a blob that is named by its hash."""
    if folder.parent.name != "snapshots":
        return
    for path in sorted(folder.rglob("*")):
        etag = path.readlink().name if path.is_symlink() else ""
        name = path.relative_to(folder).as_posix()
        if ETAG.fullmatch(etag) and is_path(name):
            yield _Expected(name, "names in the cache", etag)


def _by_checklists(folder: Path, manifest: Manifest | None) -> Iterator[_Expected]:
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
                yield _Expected(name, CHECKLIST_NAME, match[1])


def fault_of(
    folder: Path,
    name: str,
    size: int | None,
    digest: str | None,
    told: Callable[[int], None] = lambda _: None,
) -> str | None:
    """What is wrong with one file, or None. size, digest: as recorded, None: not compared."""
    try:
        with open_inside(folder, name) as opened:
            found = os.fstat(opened.fileno()).st_size
            if size is not None and found != size:
                return f"has {found:,} bytes, {size:,} are recorded"
            if digest is None or feed(opened, new_digest(digest, found), told) == digest:
                return None
            return "is not what was recorded"
    except FileNotFoundError:
        return "is missing"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


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
