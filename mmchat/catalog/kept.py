"""Rounded weights that are kept, so that they need not be rounded again.

They are exports in a folder of mmchat's own. One stands in for a model as long as the files that it
was made of are as they were.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from mmchat.catalog.source import ModelSource
from mmchat.checkpoints import exported_folder as exports
from mmchat.checkpoints.exported_folder import ExportedFolder, exported_folder
from mmchat.errors import MmchatError
from mmchat.hardware.placement import dtype_name
from mmchat.storage.space import size_of


def kept_exports() -> Iterator[ExportedFolder]:
    """All of them; what is damaged is none."""
    place = exports.kept_folder()
    for folder in sorted(place.iterdir()) if place.is_dir() else ():
        if found := kept_by(folder.name):
            yield found


def kept_by(name: str) -> ExportedFolder | None:
    """The one of this name."""
    if "/" in name or name.startswith("."):
        return None
    with suppress(MmchatError, OSError, ValueError):
        return exported_folder(exports.kept_folder() / name)
    return None


def find_kept(
    source: ModelSource, scheme: str, keep: Collection[str], dtype: str
) -> ExportedFolder | None:
    """What was kept of the weights of `source`, with its adapters, and is whole.

    keep: as of LoadOptions; dtype: too, "auto" takes any.
    """
    wanted = (scheme, tuple(keep), tuple(map(str, source.adapters)))
    known: str | None = None  # asked for only where there is one to compare
    for found in kept_exports():
        record = found.record
        is_alike = (record.scheme, record.keep, record.adapters) == wanted
        if not is_alike or (dtype != "auto" and dtype_name(dtype) != record.dtype):
            continue
        known = origin(source) if known is None else known
        sizes = ((size_of(found.path / name), file.size) for name, file in found.files.items())
        if record.origin == known != "" and all(there == size for there, size in sizes):
            return found
    return None


def place_for(
    source: ModelSource, scheme: str, keep: Collection[str], calibrate: Path | None
) -> Path:
    """The folder for such weights of `source`: a new one, or that of older ones of it.

    What was rounded by samples, which takes long, is replaced by such alone.
    """
    words = [source.spec.name, *(adapter.name for adapter in source.adapters), scheme, *keep]
    name = re.sub(r"[^\w.-]+", "-", "-".join(words))
    made_of = source.spec.name, str(source.checkpoint)
    adapters = tuple(map(str, source.adapters))
    for number in itertools.count(1):
        folder = exports.kept_folder() / (name if number == 1 else f"{name}-{number}")
        found = kept_by(folder.name)
        is_older = found and found.source in made_of and found.record.adapters == adapters
        is_lost = found and found.record.calibrate and calibrate is None
        if (is_older and not is_lost) or not folder.exists():
            return folder
    raise AssertionError("numbers do not end")


def origin(source: ModelSource) -> str:
    """Stands for the files of a model and what they are read as; "" if they cannot be opened.

    No weight is read: files are told apart by size and times. The time of a file's last change of
    any kind is one that no program can set back.
    """
    try:
        with source.open_weights() as files:
            every = list(files.files)
        for adapter in source.adapters:
            every += sorted(path for path in adapter.folder.iterdir() if path.is_file())
        stats = [(path.resolve().name, path.stat()) for path in every]
    except (MmchatError, OSError):
        return ""
    said = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return hashlib.sha256(repr((source.spec.config, said)).encode()).hexdigest()
