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
from dataclasses import replace
from pathlib import Path

from mmchat.catalog.known import find_spec
from mmchat.catalog.source import ModelSource
from mmchat.checkpoints import exported_folder as exports
from mmchat.checkpoints.exported_folder import ExportedFolder, exported_folder
from mmchat.checkpoints.hub_cache import repo_folder
from mmchat.checkpoints.manifest import is_whole
from mmchat.errors import MmchatError, quoted
from mmchat.hardware.placement import dtype_name


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


def with_kept(source: ModelSource, scheme: str, keep: Collection[str], dtype: str) -> ModelSource:
    """`source` with what was kept of its weights and adapters, or a notice that this does not fit.

    keep: as of LoadOptions; dtype: too, "auto" takes any.
    """
    known: str | None = None  # asked for only where there is one to compare
    stale = ""
    for found in kept_exports():
        record = found.record
        is_alike = (record.scheme, record.keep) == (scheme, tuple(keep))
        is_alike = is_alike and record.adapters == tuple(map(str, source.adapters))
        if not is_alike or (dtype != "auto" and dtype_name(dtype) != record.dtype):
            continue
        known = origin(source) if known is None else known
        if record.origin == known != "" and is_whole(found.path, found.files):
            return replace(source, kept=found.path)
        if found.source == source.known_as:
            stale = (
                f"{quoted(found.path.name)}, which is kept, is damaged or was made before the model"
                f" changed, so weights are rounded again; to keep them: {found.again()}"
            )
    if not stale:
        return source
    return replace(source, spec=replace(source.spec, notices=(*source.spec.notices, stale)))


def kept_below(folder: Path) -> Iterator[ExportedFolder]:
    """What was kept of models and adapters that are in `folder`, or in a repository that it is."""
    for found in kept_exports():
        spec = find_spec(found.source)
        model = repo_folder(spec.repo) if spec and spec.repo else Path(found.source)
        if any(
            place.resolve().is_relative_to(folder.resolve())
            for place in (model, *map(Path, found.record.adapters))
        ):
            yield found


def place_for(
    source: ModelSource, scheme: str, keep: Collection[str], calibrate: Path | None
) -> Path:
    """The folder for such weights of `source`: a new one, or that of older ones of it.

    What was rounded by samples, which takes long, is replaced by such alone.
    """
    words = [source.spec.name, *(adapter.name for adapter in source.adapters), scheme, *keep]
    name = re.sub(r"[^\w.-]+", "-", "-".join(words))
    adapters = tuple(map(str, source.adapters))
    for number in itertools.count(1):
        folder = exports.kept_folder() / (name if number == 1 else f"{name}-{number}")
        found = kept_by(folder.name)
        is_older = found and found.source == source.known_as and found.record.adapters == adapters
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
