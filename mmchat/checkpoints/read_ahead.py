"""Ask the system to read weights into memory before they are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 2**20  # Linux begins no more than its read-ahead window in one call


def read_ahead(files: Sequence[Path], memory: int) -> int:
    """Start reading `files` into the page cache; bytes asked for.

    Does nothing if they are larger than `memory`, bytes that can be had: they would push each other
    out. What cannot be read is left to the loader, which says so.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    asked = 0
    with suppress(OSError):
        sizes = {file: file.stat().st_size for file in files}
        if sum(sizes.values()) > memory:
            return 0
        for file, size in sizes.items():
            asked += _read_file_ahead(file, size)
    return asked


def _read_file_ahead(file: Path, size: int) -> int:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for start in range(0, size, CHUNK_BYTES):
            os.posix_fadvise(descriptor, start, CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
    return size
