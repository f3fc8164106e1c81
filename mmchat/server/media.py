"""Files of the one folder whose pictures clients may name: nothing outside is even looked at."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmchat import limits


def read_media(folder: Path, source: str) -> bytes | None:
    """A regular file in the folder, by its path there or its whole one; None for all others.

    It is opened part by part without links, so that nothing can lead out, also while it is opened.
    """
    parts = _parts(folder, source)
    if parts is None:
        return None
    try:
        with ExitStack() as opened:
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, place)
            for part in parts[:-1]:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                place = os.open(part, flags, dir_fd=place)
                opened.callback(os.close, place)
            # O_NONBLOCK: a pipe would wait for its writer
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(parts[-1], flags, dir_fd=place)
            opened.callback(os.close, file)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            with os.fdopen(os.dup(file), "rb") as stream:
                data = stream.read(limits.IMAGE_BYTES + 1)
    except (OSError, ValueError):
        return None
    return data if len(data) <= limits.IMAGE_BYTES else None


def _parts(folder: Path, source: str) -> list[str] | None:
    path = source
    if source[:5].lower() == "file:":
        try:
            address = urlsplit(source)
        except ValueError:
            return None
        if address.netloc not in ("", "localhost"):
            return None
        path = unquote(address.path)
    if path.startswith("/"):
        roots = (f"{str(root).rstrip('/')}/" for root in (folder.absolute(), folder.resolve()))
        root = next((root for root in roots if path.startswith(root)), None)
        if root is None:
            return None
        path = path[len(root) :]
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return None
    return parts
