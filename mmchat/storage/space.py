"""Sizes of files, and room on a disk, asked before the long work."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmchat.errors import DiskError, disk_errors, quoted

_SPARE = 0.01  # of the bytes to write, kept free beside them


def size_of(path: Path) -> int | None:
    """Bytes of a file, links followed; None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def free_bytes(folder: Path) -> int:
    """Bytes free where `folder` is or will be. Raises DiskError."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    with disk_errors(quoted(place, 300)):
        return shutil.disk_usage(place).free


def check_space(folder: Path, size: int, what: str, option: str = "--output") -> None:
    """Raise DiskError unless `size` bytes and a few to spare are free where `folder` will be.

    what: needs them, in words. option: by which the user chooses another disk.
    """
    needed, free = int(size * (1 + _SPARE)), free_bytes(folder)
    if needed > free:
        raise DiskError(
            f"{what} needs {needed:,} bytes more in {quoted(folder, 300)}, and {free:,} are free;"
            f" free {needed - free:,}, or choose another disk with {option}"
        )
