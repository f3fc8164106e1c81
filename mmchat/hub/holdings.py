"""What of a repository is on this machine, and how it is removed again.

huggingface_hub removes whole revisions; here the files that another tool put stay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.hub_cache import (
    cache_folder,
    cached_snapshot,
    commit_of,
    is_repo_id,
    repo_folder,
    weight_files,
)
from mmchat.checkpoints.manifest import MANIFEST_NAME, Manifest, is_whole, read_manifest
from mmchat.checkpoints.names import place_of
from mmchat.errors import CheckpointError, DiskError, UsageError, quoted
from mmchat.hub.places import CachePlace, FolderPlace, old_manifest
from mmchat.storage.safe_files import alone_in
from mmchat.storage.space import size_of

# present: whole, by mmchat's record. unrecorded: weights whole, put by another tool.
# unreadable: for want of permission, or as the disk is damaged.
State = Literal["present", "unrecorded", "incomplete", "absent", "unreadable"]


@dataclass(frozen=True)
class Holding:
    """What is there of one repository. bytes: on disk, unfinished parts included."""

    state: State
    folder: Path | None = None
    formats: tuple[str, ...] = ()
    bytes: int = 0
    commit: str | None = None


def holding(repo: str) -> Holding:
    """What the Hugging Face cache has of `repo`; reads names, sizes and headers."""
    try:
        return _seen(repo)
    except OSError:
        return Holding("unreadable", repo_folder(repo))


def _seen(repo: str) -> Holding:
    folder = cached_snapshot(repo)
    place = CachePlace(repo_folder(repo), folder.name if folder else "")
    if folder is None:
        total = _total([*place.parts(), *place.put_blobs()])
        return Holding("incomplete" if total else "absent", bytes=total)
    manifest = old_manifest(place.manifest_path)
    if manifest is None:
        state: State = "unrecorded" if _weights_are_whole(folder) else "incomplete"
    else:
        state = "present" if is_whole(folder, manifest.files) else "incomplete"
    known = {".pth": "original", ".bin": "bin"}
    formats = {known.get(f.suffix, "safetensors") for f in weight_files(folder)}
    if "bin" not in formats:  # which stand for the safetensors that a repository lacks
        formats |= set(manifest.selections) if manifest else set()
    files = {path.resolve() for path in folder.rglob("*") if path.is_file()}
    total = _total([*files, *place.parts()])
    return Holding(state, folder, tuple(sorted(formats)), total, folder.name)


def _weights_are_whole(folder: Path) -> bool:
    try:
        with open_checkpoint(folder, merge_rules=lambda _: None):
            return True
    except CheckpointError:
        return False


def _total(paths: Iterable[Path]) -> int:
    return sum(size_of(path) or 0 for path in paths)


def recorded_repos() -> list[str]:
    """The repositories in the cache that mmchat put something of; none if it cannot be read."""
    try:
        names = [path.parent.name for path in cache_folder().glob("models--*/mmchat")]
    except OSError:
        return []
    repos = (name.removeprefix("models--").replace("--", "/", 1) for name in names)
    return sorted(repo for repo in repos if is_repo_id(repo))


@dataclass(frozen=True)
class Removal:
    """What a removal deletes, in this order. freed: bytes; kept: files that stay.

    root: the folder below which empty folders go too. work: the one that a download locks.
    """

    root: Path
    work: Path
    files: tuple[Path, ...]
    freed: int
    kept: tuple[Path, ...]


def repo_removal(repo: str) -> Removal:
    """All that mmchat put of `repo` into the cache, and nothing that other files there need.

    Raises CheckpointError if there is nothing.
    """
    root = repo_folder(repo)
    records = sorted((root / "mmchat").glob("*.json"))
    links: set[Path] = set()
    for record in records:
        links |= _put_files(root / "snapshots" / record.stem, old_manifest(record))
    kept = {path for path in (root / "snapshots").rglob("*") if not path.is_dir()} - links
    needed = {path.resolve() for path in kept}
    place = CachePlace(root, "")
    put = place.put_blobs()
    blobs = [blob for blob in put if blob.resolve() not in needed]
    content = [*(path for path in links if not path.is_symlink()), *blobs, *place.parts()]
    # The records last: what a removal that is stopped leaves, the next one must know to be ours.
    files = [*sorted(links), *blobs, *place.parts(), *records]
    if blobs == put and place.journal.exists():
        files.append(place.journal)
    if not files:
        advice = f"; 'hf cache rm model/{repo}' removes what another tool put" if kept else ""
        raise CheckpointError(f"mmchat put nothing of {repo} on this machine{advice}")
    return Removal(root, place.work, tuple(files), _total(content), tuple(sorted(kept)))


def _put_files(folder: Path, manifest: Manifest | None) -> set[Path]:
    """What mmchat put into `folder` and is there, none of it outside. Raises CheckpointError."""
    records = manifest.files if manifest else {}
    paths = [place_of(folder, name) for name, record in records.items() if record.put]
    return {path for path in paths if path.is_symlink() or path.is_file()}


def folder_removal(folder: Path) -> Removal:
    """What mmchat put into a folder of the user's.

    Raises CheckpointError if that is unknown, or said to be elsewhere.
    """
    place = FolderPlace(folder)
    manifest = read_manifest(place.manifest_path)
    if manifest is None:
        raise CheckpointError(
            f"{quoted(folder, 300)} has no {MANIFEST_NAME}: mmchat cannot tell what it put there"
        )
    files = [*sorted(_put_files(folder, manifest)), *place.parts()]
    files += [path for path in (place.journal, place.manifest_path) if path.is_file()]
    kept = {path for path in folder.rglob("*") if path.is_file()}.difference(files)
    return Removal(folder, place.work, tuple(files), _total(files), tuple(sorted(kept)))


def remove(removal: Removal) -> None:
    """Delete the files, then folders that became empty.

    Raises DiskError, and UsageError while a download puts more there.
    """

    def refuse() -> None:
        name = quoted(removal.root, 300)
        raise UsageError(f"another run of mmchat is downloading into {name}; wait or stop it")

    # where there is no such folder, no download is at work
    is_locked = removal.work.is_dir() and not removal.work.is_symlink()
    path = removal.work
    try:
        with alone_in(removal.work, refuse) if is_locked else nullcontext():
            for path in removal.files:
                path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DiskError(f"cannot remove {quoted(path, 300)}: {reason}") from None
    snapshots = removal.root / "snapshots"
    if removal.root.name.startswith("models--"):
        _remove_empty(snapshots)
        for ref in (removal.root / "refs").rglob("*"):
            if ref.is_file() and not (snapshots / (commit_of(ref) or "?")).is_dir():
                ref.unlink()
    _remove_empty(removal.root)


def _remove_empty(root: Path) -> None:
    """Remove what folders are empty below `root`, and itself; links are not followed."""
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
