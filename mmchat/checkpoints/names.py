"""The one rule for names that records, indexes and checklists give to files, and what opens them.

A name is relative, of plain parts; the file is regular and in the folder that the record is of, or
a blob of the Hub's cache that the folder links to.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from mmchat.errors import CheckpointError, quoted
from mmchat.storage.safe_files import open_regular

COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # sha256, or git's id
REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]{0,127}", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_][\w. +-]{0,127}", re.ASCII)
_LONGEST = 255


def is_name(value: Any) -> bool:
    """Whether `value` names a file in a folder itself, on every system."""
    return isinstance(value, str) and bool(_PART.fullmatch(value))


def is_path(value: Any) -> bool:
    """Whether `value` names a file below a folder, with "/" between its parts."""
    return isinstance(value, str) and len(value) <= _LONGEST and all(map(is_name, value.split("/")))


def place_of(folder: Path, name: str) -> Path:
    """Where `name` is, or is to be, in `folder`; the file itself may be a link.

    Raises CheckpointError if the name breaks the rule, or a folder on the way is a link.
    """
    if not is_path(name):
        raise CheckpointError(f"{quoted(folder, 300)}: {quoted(name)} is no name of a file in it")
    path = folder
    for part in name.split("/")[:-1]:
        path = path / part
        if path.is_symlink():
            raise CheckpointError(
                f"{quoted(path, 300)}: is a link; a model's files are not behind one"
            )
    return folder / name


def real_path(path: Path, root: Path) -> Path:
    """`path` with links followed, if that is below the real folder `root`, or a cache's blob.

    Raises CheckpointError.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python before 3.13 on a circle of links
        raise CheckpointError(f"{quoted(path, 300)}: is a link that leads nowhere") from None
    in_hub_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if not real.is_relative_to(root) and not in_hub_cache:
        raise CheckpointError(
            f"{quoted(path, 300)}: is a link to {quoted(real, 300)}, outside the model's folder;"
            " name the folder where the files are"
        )
    return real


def open_inside(folder: Path, name: str) -> io.FileIO:
    """Open a file that a record of `folder` names. Raises CheckpointError, OSError."""
    return open_regular(real_path(place_of(folder, name), folder.resolve()))
