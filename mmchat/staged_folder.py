"""Write a folder that appears under its name whole or not at all, even when the run is killed."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmchat.errors import DiskError, UsageError, quoted

_PREFIX = ".mmchat-new-"
_OLD = "old"
_HERE = -100  # AT_FDCWD
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


@contextmanager
def staged_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder elsewhere, which takes the place of `folder` when the block ends well.

    replace: what stands there is exchanged for the new folder in one step, then removed; else it
    must not be there, or be empty. A run that was killed leaves a hidden folder beside it, which
    the next one removes. Raises DiskError, and UsageError when another run writes the same folder.
    """
    outside = folder.parent / f"{_PREFIX}{folder.name}"
    try:
        with _locked(outside, folder):
            _recover(outside, folder)
            work = outside / "new"
            work.mkdir()
            yield work
            _put(work, folder, outside, replace=replace)
            sync(folder.parent)
            shutil.rmtree(outside, ignore_errors=True)
    except OSError as error:
        raise DiskError(f"cannot write {quoted(folder, 300)}: {error.strerror or error}") from None


@contextmanager
def _locked(outside: Path, folder: Path) -> Iterator[None]:
    """Hold the staging folder; it is removed when the block fails."""
    outside.mkdir(exist_ok=True)
    descriptor = os.open(outside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run of mmchat is writing {quoted(folder, 300)}") from None
        try:
            yield
        except BaseException:
            _recover(outside, folder)
            shutil.rmtree(outside, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _recover(outside: Path, folder: Path) -> None:
    """Undo what a killed run had begun: put back what it had moved away, remove the rest."""
    if (outside / _OLD).exists() and not folder.exists():
        (outside / _OLD).rename(folder)
    for left in outside.iterdir():
        shutil.rmtree(left, ignore_errors=True)


def _put(work: Path, folder: Path, outside: Path, *, replace: bool) -> None:
    sync(work)
    if not replace:
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        work.rename(folder)
    elif not _exchange(work, folder):
        folder.rename(outside / _OLD)
        work.rename(folder)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return library.renameat2(_HERE, names[0], _HERE, names[1], _SWAP) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(*names, _SWAP) == 0
    return False


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable; some systems cannot, which is no fault."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
