"""Where fetched files are put: in the Hugging Face cache, or in a folder of one's own.

Both know which files they have, take finished parts, and write the record of them last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmchat import limits
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmchat.checkpoints.names import ETAG, place_of, real_path
from mmchat.errors import CheckpointError, UsageError, quoted
from mmchat.hub.client import HubFile
from mmchat.hub.transfer import has_etag
from mmchat.storage import atomic_file
from mmchat.storage.safe_files import open_regular, sweep, sync, temporary_folder
from mmchat.storage.space import size_of

PART_ENDING = ".mmchat.part"


class Place(ABC):
    """A folder that a download fills. folder: where the files lie by their names at the end.

    work: what is ours beside them; one process at a time holds its lock. journal: the etags of the
    files that mmchat put, one a line, each written before its file is.
    """

    def __init__(self, folder: Path, work: Path, manifest_path: Path) -> None:
        self.folder = folder
        self.work = work
        self.manifest_path = manifest_path
        self.journal = work / "placed"

    @abstractmethod
    def part(self, file: HubFile) -> Path:
        """Where `file` grows while it is fetched. Raises CheckpointError."""

    @abstractmethod
    def target(self, file: HubFile) -> Path:
        """Where its content is put when it is whole. Raises CheckpointError."""

    @abstractmethod
    def has(self, file: HubFile) -> bool:
        """Whether `file` is there, whole."""

    def put(self, file: HubFile) -> None:
        """Move the finished part of `file` to its place."""
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(self.journal, "a") as opened:
            opened.write(f"{file.etag}\n".encode())
        target = self.target(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.part(file).replace(target)
        sync(target.parent)

    def put_etags(self) -> set[str]:
        """The etags in the journal."""
        try:
            with open_regular(self.journal) as opened:
                lines = opened.read(limits.INDEX_JSON_BYTES).decode("ascii", "replace").split()
        except OSError:
            return set()
        return {line for line in lines if ETAG.fullmatch(line)}

    def finish(self, files: Sequence[HubFile], manifest: Manifest) -> None:
        """Write the record of `files`, and of those that an older one of the same commit names."""
        old = old_manifest(self.manifest_path)
        if old and old.commit == manifest.commit:
            by_commit = manifest.revision == manifest.commit
            manifest = replace(
                manifest,
                files=old.files,
                revision=old.revision if by_commit else manifest.revision,
                selections=tuple(sorted({*old.selections, *manifest.selections})),
            )
        records, ours = dict(manifest.files), self.put_etags()
        for file in files:
            before = records.get(file.path)
            was_put = before is not None and before.put and before.etag == file.etag
            sha256 = file.etag if len(file.etag) == 64 else sha256_of(self.folder / file.path)
            is_put = was_put or file.etag in ours
            records[file.path] = FileRecord(file.size, sha256, file.etag, is_put)
        there = {name: r for name, r in records.items() if (self.folder / name).is_file()}
        self.manifest_path.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(self.manifest_path, replace(manifest, files=there))


class CachePlace(Place):
    """A commit in the Hugging Face cache: content in blobs/, names in snapshots/ as links.

    What is ours lies in mmchat/ beside them: the journal and a manifest for each commit.
    """

    def __init__(self, root: Path, commit: str) -> None:
        work = root / "mmchat"
        super().__init__(root / "snapshots" / commit, work, work / f"{commit}.json")
        self.root = root

    def target(self, file: HubFile) -> Path:
        return self.root / "blobs" / file.etag

    def part(self, file: HubFile) -> Path:
        return self.root / "blobs" / f"{file.etag}{PART_ENDING}"

    def parts(self) -> list[Path]:
        return sorted((self.root / "blobs").glob(f"*{PART_ENDING}"))

    def put_blobs(self) -> list[Path]:
        """The content that mmchat put and that is there."""
        blobs = (self.root / "blobs" / etag for etag in sorted(self.put_etags()))
        return [blob for blob in blobs if blob.is_file()]

    def has(self, file: HubFile) -> bool:
        blob = self.target(file)
        if size_of(blob) != file.size:
            return False
        return file.etag in self.put_etags() or has_etag(blob, file)

    def finish(self, files: Sequence[HubFile], manifest: Manifest) -> None:
        for folder in {(self.folder / file.path).parent for file in files}:
            sweep(folder)  # every file may have its link already
        for file in files:
            self._link(file)
        if manifest.revision and manifest.revision != manifest.commit:
            ref = self.root / "refs" / manifest.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            atomic_file.write_bytes(ref, (manifest.commit or "").encode(), follow=False)
        super().finish(files, manifest)

    def _link(self, file: HubFile) -> None:
        """Give the blob its name; a link where the file system knows links, else a copy."""
        pointer, blob = self.folder / file.path, self.target(file)
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


class FolderPlace(Place):
    """A folder of the user's, with the files under their own names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / ".mmchat", folder / MANIFEST_NAME)

    def target(self, file: HubFile) -> Path:
        return place_of(self.folder, file.path)

    def part(self, file: HubFile) -> Path:
        if self.work.is_symlink():
            raise CheckpointError(f"{quoted(self.work, 300)} is a link; remove it")
        return self.work / f"{file.path.replace('/', '+')}.{file.etag}{PART_ENDING}"

    def parts(self) -> list[Path]:
        return [] if self.work.is_symlink() else sorted(self.work.glob(f"*{PART_ENDING}"))

    def has(self, file: HubFile) -> bool:
        """Raises UsageError rather than let a file be replaced that mmchat did not put."""
        path = self.target(file)
        if not path.exists() and not path.is_symlink():
            return False
        with contextlib.suppress(CheckpointError):
            if has_etag(real_path(path, self.folder.resolve()), file):
                return True
        known = old_manifest(self.manifest_path)
        if (known and file.path in known.files) or file.etag in self.put_etags():
            return False
        raise UsageError(
            f"{quoted(path, 300)} is there already and differs from the Hub's; choose another"
            " --local-dir or move it away"
        )

    def finish(self, files: Sequence[HubFile], manifest: Manifest) -> None:
        super().finish(files, manifest)
        self.journal.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.work.rmdir()


def place_at(folder: Path) -> Place:
    """The place that has this folder: a commit in the cache, or one of the user's."""
    root = folder.parent.parent
    if folder.parent.name == "snapshots" and root.name.startswith("models--"):
        return CachePlace(root, folder.name)
    return FolderPlace(folder)


def old_manifest(path: Path) -> Manifest | None:
    """The manifest in `path`; None also if it is damaged, for it will be written anew."""
    try:
        return read_manifest(path)
    except CheckpointError:
        return None
