"""Where fetched files are put: in the Hugging Face cache, or in a folder of one's own.

Both know which files they have, take finished parts, and write the manifest last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mmchat import limits
from mmchat.checkpoints.hub_cache import cache_folder
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmchat.checkpoints.names import ETAG, place_of, real_path
from mmchat.errors import CheckpointError, DiskError, UsageError, quoted
from mmchat.hub.client import HubFile
from mmchat.hub.transfer import has_etag
from mmchat.storage import atomic_file
from mmchat.storage.safe_files import open_regular, sweep, sync, temporary_folder

PART_ENDING = ".mmchat.part"


class Place(Protocol):
    """A folder that a download fills. folder: where the files lie by their names at the end.

    work: what is ours beside them; one process at a time holds its lock.
    """

    folder: Path
    work: Path
    manifest_path: Path

    def part(self, file: HubFile) -> Path:
        """Where `file` grows while it is fetched."""
        ...

    def has(self, file: HubFile) -> bool:
        """Whether `file` is there, whole."""
        ...

    def put(self, file: HubFile) -> None:
        """Move the finished part of `file` to its place."""
        ...

    def finish(self, files: Sequence[HubFile], manifest: Manifest) -> None:
        """Make all `files` visible under their names, then write the manifest."""
        ...


class _Journal:
    """Etags of the files that mmchat put, one per line, each written before its file is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, etag: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self.path, flags, 0o644), "a") as opened:
            opened.write(f"{etag}\n")

    def etags(self) -> set[str]:
        try:
            with open_regular(self.path) as opened:
                lines = opened.read(limits.INDEX_JSON_BYTES).decode("ascii", "replace").split()
        except OSError:
            return set()
        return {line for line in lines if ETAG.fullmatch(line)}


def old_manifest(path: Path) -> Manifest | None:
    """The manifest in `path`; None also if it is damaged, for it will be written anew."""
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def _records(
    place: Place, files: Sequence[HubFile], ours: set[str], old: Manifest | None
) -> dict[str, FileRecord]:
    """Records of `files`, after those of `old` whose files are still there."""
    records = dict(old.files) if old else {}
    for file in files:
        before = records.get(file.path)
        path = place.folder / file.path
        sha256 = file.etag if len(file.etag) == 64 else sha256_of(path)
        was_put = before is not None and before.put and before.etag == file.etag
        records[file.path] = FileRecord(file.size, sha256, file.etag, was_put or file.etag in ours)
    return {name: r for name, r in records.items() if (place.folder / name).is_file()}


def _write_record(place: Place, files: Sequence[HubFile], ours: set[str], new: Manifest) -> None:
    old = old_manifest(place.manifest_path)
    if old and old.commit != new.commit:
        old = None
    selections, revision = new.selections, new.revision
    if old:
        selections = tuple(sorted({*old.selections, *selections}))
        revision = old.revision if revision == new.commit else revision
    place.manifest_path.parent.mkdir(parents=True, exist_ok=True)
    records = _records(place, files, ours, old)
    write_manifest(
        place.manifest_path,
        Manifest(records, new.repo, revision, new.commit, selections, new.source),
    )


class CachePlace:
    """A commit in the Hugging Face cache: content in blobs/, names in snapshots/ as links.

    What is ours lies in mmchat/ beside them: the journal and a manifest for each commit.
    """

    def __init__(self, repo: str, commit: str) -> None:
        self.root = repo_folder(repo)
        self.folder = self.root / "snapshots" / commit
        self.work = self.root / "mmchat"
        self.manifest_path = self.work / f"{commit}.json"
        self.journal = _Journal(self.work / "placed")

    def blob(self, file: HubFile) -> Path:
        return self.root / "blobs" / file.etag

    def part(self, file: HubFile) -> Path:
        blob = self.blob(file)
        return blob.with_name(blob.name + PART_ENDING)

    def has(self, file: HubFile) -> bool:
        blob = self.blob(file)
        try:
            if blob.stat().st_size != file.size:
                return False
        except OSError:
            return False
        return file.etag in self.journal.etags() or has_etag(blob, file)

    def put(self, file: HubFile) -> None:
        self.journal.add(file.etag)
        self.part(file).replace(self.blob(file))
        sync(self.blob(file).parent)

    def finish(self, files: Sequence[HubFile], manifest: Manifest) -> None:
        for folder in {(self.folder / file.path).parent for file in files}:
            sweep(folder)  # every file may have its link already
        for file in files:
            self._link(file)
        if manifest.revision and manifest.revision != manifest.commit:
            self._write_ref(manifest.revision, manifest.commit or "")
        _write_record(self, files, self.journal.etags(), manifest)

    def _link(self, file: HubFile) -> None:
        """Give the blob its name; a link where the file system knows links, else a copy."""
        pointer, blob = self.folder / file.path, self.blob(file)
        if pointer.exists() and pointer.samefile(blob):
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(pointer.parent) as work:
            temporary = work / "file"
            try:
                temporary.symlink_to(os.path.relpath(blob, pointer.parent.resolve()))
            except OSError:
                shutil.copyfile(blob, temporary)
                sync(temporary)
            temporary.replace(pointer)

    def _write_ref(self, revision: str, commit: str) -> None:
        ref = self.root / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        atomic_file.write_bytes(ref, commit.encode(), follow=False)


class FolderPlace:
    """A folder of the user's, with the files under their own names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest_path = folder / MANIFEST_NAME
        self.work = folder / ".mmchat"
        self.journal = _Journal(self.work / "placed")
        known = old_manifest(self.manifest_path)
        self._known = dict(known.files) if known else {}

    def part(self, file: HubFile) -> Path:
        if self.work.is_symlink():
            raise CheckpointError(f"{quoted(self.work, 300)} is a link; remove it")
        return self.work / f"{file.path.replace('/', '+')}.{file.etag}{PART_ENDING}"

    def has(self, file: HubFile) -> bool:
        """Raises UsageError rather than let a file be replaced that mmchat did not put."""
        path = place_of(self.folder, file.path)
        if not path.exists() and not path.is_symlink():
            return False
        with contextlib.suppress(CheckpointError):
            if has_etag(real_path(path, self.folder.resolve()), file):
                return True
        if file.path in self._known or file.etag in self.journal.etags():
            return False
        raise UsageError(
            f"{quoted(path, 300)} is there already and differs from the Hub's; choose another"
            " --local-dir or move it away"
        )

    def put(self, file: HubFile) -> None:
        self.journal.add(file.etag)
        path = place_of(self.folder, file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.part(file).replace(path)
        sync(path.parent)

    def finish(self, files: Sequence[HubFile], manifest: Manifest) -> None:
        _write_record(self, files, self.journal.etags(), manifest)
        self.journal.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.work.rmdir()


@contextlib.contextmanager
def alone_in(folder: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of a folder, which is made if need be, and removed if it stays empty.

    Calls `waiting` before it waits for another process, and gives True after that. The lock goes
    with the process that holds it. Raises OSError.
    """
    has_waited = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not has_waited:
                waiting()
            has_waited = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the hash at the end still decides
            pass
        if _is_still(folder, descriptor):
            break
        os.close(descriptor)
    try:
        yield has_waited
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether the name stands for the folder that was opened: another process may remove it."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def repo_folder(repo: str) -> Path:
    """The folder of a repository in the Hugging Face cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def free_bytes(folder: Path) -> int:
    """Bytes free where `folder` is or will be. Raises DiskError."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError as error:
        raise DiskError(f"{quoted(place, 300)}: {error.strerror or error}") from None


def manifest_path_of(folder: Path) -> Path:
    """Where the manifest of a folder is: for a commit in the cache beside its snapshots."""
    root = folder.parent.parent
    if folder.parent.name == "snapshots" and root.name.startswith("models--"):
        return root / "mmchat" / f"{folder.name}.json"
    return folder / MANIFEST_NAME
