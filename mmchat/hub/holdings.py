"""What of a repository is on this machine, and how it is removed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.hub_cache import cache_folder, cached_snapshot, is_repo_id, weight_files
from mmchat.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from mmchat.checkpoints.names import place_of
from mmchat.errors import CheckpointError, DiskError, quoted
from mmchat.hub.places import (
    PART_ENDING,
    CachePlace,
    manifest_path_of,
    old_manifest,
    repo_folder,
)

# present: whole, by mmchat's record. unrecorded: weights whole, put by another tool.
State = Literal["present", "unrecorded", "incomplete", "absent"]


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
    parts = sum(_size(part) for part in (repo_folder(repo) / "blobs").glob(f"*{PART_ENDING}"))
    folder = cached_snapshot(repo)
    if folder is None:
        blobs = sum(_size(repo_folder(repo) / "blobs" / etag) for etag in _put_etags(repo))
        return Holding("incomplete", bytes=parts + blobs) if parts + blobs else Holding("absent")
    return _described(folder, parts)


def _described(folder: Path, parts: int = 0) -> Holding:
    manifest = old_manifest(manifest_path_of(folder))
    state: State = "incomplete"
    if manifest is not None:
        records = manifest.files.items()
        if all(_size(folder / name, -1) == record.size for name, record in records):
            state = "present"
    elif _weights_are_whole(folder):
        state = "unrecorded"
    real = {path.resolve() for path in folder.rglob("*") if path.is_file()}
    formats = {"original" if f.suffix == ".pth" else "safetensors" for f in weight_files(folder)}
    if manifest is not None:
        formats |= set(manifest.selections)
    total = sum(_size(path) for path in real) + parts
    return Holding(state, folder, tuple(sorted(formats)), total, folder.name)


def _weights_are_whole(folder: Path) -> bool:
    try:
        with open_checkpoint(folder, merge_rules=lambda _: None):
            return True
    except CheckpointError:
        return False


def _size(path: Path, missing: int = 0) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return missing


def _put_etags(repo: str) -> set[str]:
    return CachePlace(repo, "").journal.etags()


def recorded_repos() -> list[str]:
    """The repositories in the cache that mmchat put something of."""
    names = (path.parent.name for path in cache_folder().glob("models--*/mmchat"))
    repos = (name.removeprefix("models--").replace("--", "/", 1) for name in names)
    return sorted(repo for repo in repos if is_repo_id(repo))


@dataclass(frozen=True)
class Removal:
    """What a removal deletes, in this order. freed: bytes; kept: files that stay.

    root: the folder below which empty folders go too.
    """

    root: Path
    files: tuple[Path, ...]
    freed: int
    kept: tuple[Path, ...]


def repo_removal(repo: str) -> Removal:
    """All that mmchat put of `repo` into the cache, and nothing that other files there need.

    Raises CheckpointError if there is nothing.
    """
    root = repo_folder(repo)
    put = _put_etags(repo)
    manifests = sorted((root / "mmchat").glob("*.json"))
    names = {
        path
        for recorded in manifests
        if (manifest := old_manifest(recorded))
        for path in _put_files(root / "snapshots" / recorded.stem, manifest)
    }
    others = {path for path in (root / "snapshots").rglob("*") if not path.is_dir()} - names
    needed = {path.resolve() for path in others}
    blobs = [blob for etag in put if (blob := root / "blobs" / etag).is_file()]
    blobs = [blob for blob in blobs if blob.resolve() not in needed]
    parts = sorted((root / "blobs").glob(f"*{PART_ENDING}"))
    links = sorted(path for path in names if path.is_symlink() or path.is_file())
    files = [*manifests, *links, *blobs, *parts]
    if len(blobs) == len([etag for etag in put if (root / "blobs" / etag).is_file()]):
        files += (root / "mmchat").glob("placed")
    if not files:
        advice = f"; 'hf cache rm model/{repo}' removes what another tool put" if others else ""
        raise CheckpointError(f"mmchat put nothing of {repo} on this machine{advice}")
    copies = [path for path in links if not path.is_symlink()]
    freed = sum(_size(path) for path in (*blobs, *parts, *copies))
    return Removal(root, tuple(files), freed, tuple(sorted(others)))


def _put_files(folder: Path, manifest: Manifest) -> list[Path]:
    """What mmchat put into `folder`, nothing outside of it. Raises CheckpointError."""
    return [place_of(folder, name) for name, record in manifest.files.items() if record.put]


def folder_removal(folder: Path) -> Removal:
    """What mmchat put into a folder of the user's.

    Raises CheckpointError if that is unknown, or said to be elsewhere.
    """
    manifest = read_manifest(folder / MANIFEST_NAME)
    if manifest is None:
        raise CheckpointError(
            f"{quoted(folder, 300)} has no {MANIFEST_NAME}: mmchat cannot tell what it put there"
        )
    files = [path for path in _put_files(folder, manifest) if path.is_symlink() or path.is_file()]
    work = folder / ".mmchat"
    parts = [*work.glob(f"*{PART_ENDING}"), *work.glob("placed")] if not work.is_symlink() else []
    gone = {*files, *parts, folder / MANIFEST_NAME}
    kept = [path for path in folder.rglob("*") if path.is_file() and path not in gone]
    freed = sum(_size(path) for path in gone)
    return Removal(folder, (folder / MANIFEST_NAME, *files, *parts), freed, tuple(sorted(kept)))


def remove(removal: Removal) -> None:
    """Delete the files, then folders that became empty. Raises DiskError."""
    for path in removal.files:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise DiskError(f"cannot remove {quoted(path, 300)}: {reason}") from None
    for folder in sorted(_folders(removal.root / "snapshots"), reverse=True):
        _remove_empty(folder)
    for ref in _refs(removal.root):
        commit = ref.read_text("ascii", "replace").strip()
        if not (removal.root / "snapshots" / commit).is_dir():
            ref.unlink()
    for folder in sorted(_folders(removal.root), reverse=True):
        _remove_empty(folder)


def _folders(root: Path) -> Iterator[Path]:
    yield root
    yield from (path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())


def _refs(root: Path) -> list[Path]:
    is_cache = root.name.startswith("models--")
    return [path for path in (root / "refs").rglob("*") if path.is_file()] if is_cache else []


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
