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
    try:
        *folders, name = _parts(folder, source)
        with ExitStack() as opened:
            place = os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, place)
            # O_NONBLOCK: a pipe would wait for its writer
            for part, kind in (*((one, os.O_DIRECTORY) for one in folders), (name, os.O_NONBLOCK)):
                place = os.open(part, kind | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
                opened.callback(os.close, place)
            if not stat.S_ISREG(os.fstat(place).st_mode):
                return None
            with os.fdopen(os.dup(place), "rb") as stream:
                data = stream.read(limits.IMAGE_BYTES + 1)
    except (OSError, ValueError):
        return None
    return data if len(data) <= limits.IMAGE_BYTES else None


def _parts(folder: Path, source: str) -> list[str]:
    """Raises ValueError for what is not in the folder."""
    path = source
    if source[:5].lower() == "file:":
        address = urlsplit(source)
        if address.netloc not in ("", "localhost"):
            raise ValueError("of another machine")
        path = unquote(address.path)
    if path.startswith("/"):
        roots = (f"{str(root).rstrip('/')}/" for root in (folder.absolute(), folder.resolve()))
        path, *_ = [path[len(root) :] for root in roots if path.startswith(root)]
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError("outside")
    return parts
