"""Write a file so that a reader finds the old content or the new one, never a half."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mmchat.errors import DiskError, quoted
from mmchat.storage.safe_files import sync, temporary_file


def check_writable(path: Path) -> None:
    """Fail before the long work if `path` cannot be written later.

    Raises DiskError if the folder is missing or not writable, or `path` is a folder, no possible
    name, or `-`, which people write for stdout.
    """
    folder = path.parent
    refuse_stdout(path)
    try:
        target = path if _is_special(path) else folder
    except (OSError, ValueError) as error:
        raise _no_name(path, error) from None
    if path.is_dir():
        raise DiskError(f"cannot write {str(path)!r}: it is a folder; give a file name")
    if not folder.is_dir():
        raise DiskError(f"cannot write {str(path)!r}: the folder {str(folder)!r} does not exist")
    if not os.access(target, os.W_OK):
        raise DiskError(f"cannot write {str(path)!r}: no permission to write in {str(folder)!r}")


def refuse_stdout(path: Path) -> None:
    """Raises DiskError for `-`."""
    if path == Path("-"):
        raise DiskError("cannot write '-': stdout is not possible here; give the name of a file")


def _no_name(path: Path, error: Exception) -> DiskError:
    """The error of a name with a NUL has no reason."""
    reason = getattr(error, "strerror", None) or "it is no usable file name"
    return DiskError(f"cannot write {quoted(path)}: {reason}; give another name")


def write_bytes(path: Path, data: bytes, *, mode: int = 0o666, follow: bool = True) -> None:
    """Replace the content of `path` by `data`: temporary file beside it, fsync, rename.

    mode: of a new file, before the umask; that of an existing file is kept. follow: a symbolic link
    stays and its target is replaced, and a device or pipe is written directly; without it whatever
    has the name is replaced. Raises DiskError, and leaves no temporary file behind.
    """
    try:
        if not follow:
            _replace(path, data, mode)
        elif _is_special(path):
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data, mode)
    except OSError as error:
        raise DiskError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise _no_name(path, error) from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8; what UTF-8 cannot hold is written as a backslash escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def _is_special(path: Path) -> bool:
    """Not by `exists`, which from Python 3.14 on takes each impossible name for a missing one.

    Raises OSError for such a name and for links in a circle, ValueError for a NUL.
    """
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _replace(path: Path, data: bytes, mode: int) -> None:
    with temporary_file(path.parent, mode) as (temporary, file):
        if path.is_file():
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    sync(path.parent)
