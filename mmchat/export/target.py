"""The folder of an export: what it must not overwrite."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mmchat.catalog.source import ModelSource
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest
from mmchat.errors import CheckpointError, DiskError, UsageError, quoted


def check_target(folder: Path, source: ModelSource, *, force: bool) -> bool:
    """Whether an export of `source` to `folder` replaces what is there.

    Raises UsageError, DiskError.
    """
    if not folder.parent.is_dir():
        raise DiskError(f"the folder {quoted(folder.parent, 300)} does not exist")
    if not os.access(folder.parent, os.W_OK):
        raise DiskError(f"no permission to write in {quoted(folder.parent, 300)}")
    if not folder.exists() and not folder.is_symlink():
        return False
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{quoted(folder, 300)} is no folder; name another with --output")
    if not any(folder.iterdir()):
        return False
    _check_not_precious(folder, source)
    if not force and not _is_ours(folder):
        raise UsageError(
            f"{quoted(folder, 300)} holds what mmchat export did not write, or what was changed"
            " since; name a new folder with --output, or give --force to replace it"
        )
    return True


def _check_not_precious(folder: Path, source: ModelSource) -> None:
    """Not even --force replaces a folder that holds home, the model, or where the user stands."""
    inside = [Path.home(), Path.cwd(), source.checkpoint, source.tokenizer]
    for path in filter(None, inside):
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{quoted(folder, 300)} holds {quoted(path, 300)} and is not replaced; name another"
                " folder with --output"
            )


def _is_ours(folder: Path) -> bool:
    """Whether an export wrote all that is in the folder, and nobody changed it since.

    The record is the last file that an export writes, so none of the others is newer.
    """
    record = folder / MANIFEST_NAME
    try:
        manifest = read_manifest(record)
    except CheckpointError:
        return False
    if manifest is None or manifest.repo is not None:  # the record of a download names its own
        return False
    if manifest.export is None and "config.json" not in manifest.files:  # as the Hub's folders have
        return False
    written = record.stat().st_mtime_ns
    for path in folder.iterdir():
        known, found = manifest.files.get(path.name), path.lstat()
        is_whole = known and stat.S_ISREG(found.st_mode) and found.st_size == known.size
        if path != record and not (is_whole and found.st_mtime_ns <= written):
            return False
    return True
