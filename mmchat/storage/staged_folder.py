"""Write a folder that appears under its name whole or not at all, even when the run is killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmchat.errors import DiskError, UsageError, disk_errors, quoted
from mmchat.storage.safe_files import hold, make_folder, remove_left, sync

_PREFIX = ".mmchat-new-"
_OLD = "old"
_HERE = -100  # AT_FDCWD
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


@contextmanager
def staged_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder elsewhere, which takes the place of `folder` when the block ends well.

    replace: what stands there is exchanged for the new folder in one step, then removed; else it
    must not be there, or be empty: of two runs, one writes it. A run that was killed leaves a
    hidden folder beside it, which the next one removes. Raises DiskError, and UsageError when
    another run writes, or has just written, the same folder.
    """
    outside = folder.parent / f"{_PREFIX}{folder.name}"
    with disk_errors(f"cannot write {quoted(folder, 300)}"), _made(outside, folder):
        work = outside / "new"
        work.mkdir()
        yield work
        _put(work, folder, outside, replace=replace)
        sync(folder.parent)


@contextmanager
def _made(outside: Path, folder: Path) -> Iterator[None]:
    """Make and hold the staging folder, after that of a killed run; it is gone after the block."""
    while True:
        _clear(outside, folder)
        with contextlib.suppress(FileExistsError):  # another run was faster, and is found to be so
            descriptor = make_folder(outside)
            if hold(outside, descriptor):
                break
            os.close(descriptor)
    try:
        yield
    finally:
        _recover(outside, folder)
        shutil.rmtree(outside, ignore_errors=True)
        os.close(descriptor)


def _clear(outside: Path, folder: Path) -> None:
    try:
        if remove_left(outside, lambda: _recover(outside, folder)):
            return
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{quoted(folder.name)} is too long for a folder's name") from None
        raise DiskError(
            f"{quoted(outside, 300)} is in the way and no folder of this user's ({error.strerror});"
            " see what it is, and remove it"
        ) from None
    raise UsageError(
        f"another run of mmchat is writing {quoted(folder, 300)}; if none is, remove"
        f" {quoted(outside, 300)}"
    )


def _recover(outside: Path, folder: Path) -> None:
    """Put back what a run had moved away when it was killed or failed."""
    if (outside / _OLD).exists() and not folder.exists():
        (outside / _OLD).rename(folder)


def _put(work: Path, folder: Path, outside: Path, *, replace: bool) -> None:
    sync(work)
    if not replace:
        try:
            work.rename(folder)  # which an empty folder makes way for
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UsageError(
                f"{quoted(folder, 300)} was written by another run of mmchat meanwhile; it is"
                " whole, and stays"
            ) from None
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
