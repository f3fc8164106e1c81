"""Files that are made, opened and kept so that nothing beside them is touched.

A temporary name is made new, never taken over, and locked by its maker until it is gone: what no
run holds was left by one that was killed, and is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

_TEMPORARY = re.compile(r"\.mmchat-[0-9a-f]{16}\.tmp")
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR | os.O_CREAT,
    "a": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
}
_swept: set[str] = set()


def open_regular(path: Path, mode: Literal["r", "r+", "a"] = "r") -> io.FileIO:
    """Open a regular file, which "r+" and "a" make if it is not there; a link is not followed, and
    a pipe is not waited for.

    Raises OSError.
    """
    descriptor = os.open(path, _FLAGS[mode] | _SAFELY, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return io.FileIO(descriptor, mode)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable.

    Raises OSError; a file system that has no such call is no fault, nor a folder that may be
    written but not read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that a run made for a while."""
    return bool(_TEMPORARY.fullmatch(name))


@contextmanager
def temporary_file(folder: Path, mode: int = 0o600) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in `folder`, its path and itself open for writing; gone after the block.

    To keep it, rename it in the block. mode: before the umask. Raises OSError.
    """

    def create(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    path, descriptor = _make(folder, create)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`, for this user alone; gone after the block. Raises OSError."""
    path, descriptor = _make(folder, make_folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def make_folder(path: Path) -> int:
    """Make a folder that was not there, for this user alone; returns it open. Raises OSError."""
    path.mkdir(mode=0o700)
    try:
        return os.open(path, _SAFELY | os.O_DIRECTORY)
    except OSError:
        path.rmdir()
        raise


def hold(path: Path, descriptor: int) -> bool:
    """Lock what was just made at `path`; False if another run has removed it again.

    A file system without locks is no fault: nobody removes anything there either.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def alone_in(folder: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of a folder, which is made if need be, and removed if it stays empty.

    Calls `waiting` before it waits for another process, and gives True after that. The lock goes
    with the process that holds it. Raises OSError.
    """
    has_waited = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, _SAFELY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not has_waited:
                waiting()
            has_waited = True
        except OSError:  # a file system without locks
            pass
        if hold(folder, descriptor):
            break
        os.close(descriptor)
    try:
        yield has_waited
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def remove_left(path: Path, recover: Callable[[], None] = lambda: None) -> bool:
    """Remove what a killed run left at `path`, a file or a folder of this user, no link.

    recover: is called before, while `path` is locked. False if a run holds it, or may do so on a
    file system without locks. Raises OSError if it is there and is another's.
    """
    try:
        descriptor = os.open(path, _SAFELY)
    except FileNotFoundError:
        return True
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "belongs to another user")
        is_folder = stat.S_ISDIR(status.st_mode)
        if not is_folder and not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if not os.path.samestat(path.lstat(), status):
            return False
        recover()
        if is_folder:
            shutil.rmtree(path)
        else:
            path.unlink()
        return True
    finally:
        os.close(descriptor)


def _make(folder: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new name in `folder`, made and held."""
    sweep(folder)
    while True:
        path = folder / f".mmchat-{secrets.token_hex(8)}.tmp"
        descriptor = make(path)
        if hold(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed runs left in `folder`: once in a process, for that reads all names."""
    key = os.path.realpath(folder)
    if key in _swept:
        return
    _swept.add(key)
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if is_temporary(path.name)]:
            with contextlib.suppress(OSError):
                remove_left(path)
