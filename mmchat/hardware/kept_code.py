"""Native code that is kept for the next start, under the hash of its content.

What was damaged since, by a fault of the disk or a crash, does not have its hash any more: it is
removed, and the caller compiles anew. Loading it would end the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from mmchat.storage.safe_files import open_regular, sweep, sync, temporary_folder


def find(folder: Path, name: str, ending: str) -> Path | None:
    """The file that `keep` wrote under this name, if every bit of it is as it was."""
    sweep(folder)
    for path in sorted(folder.glob(f"{name}-*{ending}")):
        try:
            if path.name == _full_name(name, path, ending):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def keep(folder: Path, name: str, ending: str, make: Callable[[Path], None]) -> Path:
    """Keep what `make` writes to the path that it is given. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code that is run
    with temporary_folder(folder) as work:
        fresh = work / f"{name}{ending}"
        make(fresh)
        sync(fresh)
        kept = folder / _full_name(name, fresh, ending)
        fresh.replace(kept)
    sync(folder)
    return kept


def _full_name(name: str, path: Path, ending: str) -> str:
    with open_regular(path) as opened:
        return f"{name}-{hashlib.file_digest(opened, 'sha256').hexdigest()}{ending}"
