"""The record of what a folder should hold, written last: a folder without it is not complete.

A manifest is JSON with one object per file (size and hashes) and a digest of itself, so that a
changed bit anywhere, here too, is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.checkpoints.hub_cache import is_repo_id
from mmchat.checkpoints.names import COMMIT, ETAG, REVISION, is_path
from mmchat.errors import CheckpointError, quoted
from mmchat.storage import atomic_file
from mmchat.storage.space import size_of
from mmchat.strict_json import Where, loads, parse_dataclass, read_bounded

MANIFEST_NAME = "mmchat-manifest.json"
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EXPORT_NUMBERS = (0, 2**31)


@dataclass(frozen=True)
class FileRecord:
    """size in bytes. etag: the Hub's hash of it, if it has one. put: whether mmchat wrote it."""

    size: int
    sha256: str
    etag: str | None
    put: bool


@dataclass(frozen=True)
class ExportRecord:
    """What an exported folder was made for, and with what.

    format: "aoti", "executorch" or "safetensors". model: its name. scheme: of quantisation, but for
    the parts in keep. torch: the version that compiled the programs. device: its type. processor:
    architecture and vector instructions that the programs use, "" if there are none. max_seq_len:
    positions of prompt and answer. max_images: pictures that one prefill may see. programs: their
    names. executorch: the version that lowered them, "" if another compiler made them. adapters:
    what was merged into the model, as --adapter takes it. companion: the file or folder of its
    vision encoder, if that lay apart, as --vision-tower takes it. origin: stands for the files that
    weights alone were made of, as catalog.kept has it. calibrate: the folder of --calibrate, "" if
    weights were rounded without samples.
    """

    format: str
    model: str
    dtype: str
    scheme: str
    keep: tuple[str, ...]
    torch: str
    device: str
    processor: str
    max_seq_len: int
    max_images: int
    programs: tuple[str, ...]
    executorch: str = ""
    adapters: tuple[str, ...] = ()
    companion: str = ""
    origin: str = ""
    calibrate: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds and where it came from.

    files: by path within the folder. repo, revision, commit: of the Hub, else None. selections:
    the forms of the weights that are there whole. source: what it was made from. written: UTC.
    export: of a folder that was exported.
    """

    files: Mapping[str, FileRecord]
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    selections: tuple[str, ...] = ()
    source: str | None = None
    written: str = ""
    export: ExportRecord | None = None


_LATER = ("executorch", "adapters", "companion", "origin", "calibrate")  # left out where empty
_EXPORT_BOUNDS = {ExportRecord: {"max_seq_len": _EXPORT_NUMBERS, "max_images": _EXPORT_NUMBERS}}


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to the file `path` with the time of day. Raises DiskError."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    atomic_file.write_bytes(path, _encoded(replace(manifest, written=now)), follow=False)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in the file `path`, None if there is no such file.

    Raises CheckpointError if it is damaged, or names what is not in its folder.
    """
    if not path.exists():
        return None
    where = Where(str(path), error=CheckpointError)
    data = read_bounded(path, limits.INDEX_JSON_BYTES, where)
    manifest, is_later = None, False
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, CheckpointError):
        content = loads(data)
        is_later = content["format"] > _FORMAT
        manifest = None if is_later else _decoded(content, where)
    if is_later:
        raise where.fail("written by a later mmchat; upgrade mmchat")
    if manifest is None or _encoded(manifest) != data:
        raise where.fail("this record is damaged; remove it and download or export again")
    if reason := _out_of_place(manifest):
        raise where.fail(f"{reason}; this record was not written by mmchat, do not use the folder")
    return manifest


def _out_of_place(manifest: Manifest) -> str | None:
    """What in it may not become a part of a path."""
    records = manifest.files.values()
    values: list[tuple[Any, Callable[[str], object]]] = [
        *((name, is_path) for name in manifest.files),
        *((record.sha256, _SHA256.fullmatch) for record in records),
        *((record.etag, ETAG.fullmatch) for record in records),
        (manifest.repo, is_repo_id),
        (manifest.revision, REVISION.fullmatch),
        (manifest.commit, COMMIT.fullmatch),
        (manifest.source, lambda _: True),
    ]
    for value, fits in values:
        if value is not None and not (isinstance(value, str) and fits(value)):
            return f"{quoted(value)} is no name of a file in the folder, no hash or no source"
    return None


def _encoded(manifest: Manifest) -> bytes:
    content = {"format": _FORMAT, **asdict(manifest)}
    if (export := content.pop("export")) is not None:
        content["export"] = {n: value for n, value in export.items() if value or n not in _LATER}
    content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _decoded(content: Any, where: Where) -> Manifest:
    content.pop("format")
    content.pop("digest")
    files = {
        name: parse_dataclass(FileRecord, record, where, {FileRecord: {"size": (0, 2**53)}})
        for name, record in content.pop("files").items()
    }
    selections = tuple(content.pop("selections"))
    if "export" in content:
        content["export"] = parse_dataclass(ExportRecord, content["export"], where, _EXPORT_BOUNDS)
    return Manifest(files=files, selections=selections, **content)


def is_whole(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether the files of a record are in `folder`, in their sizes."""
    return all(size_of(folder / name) == record.size for name, record in files.items())


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hexadecimal. Raises OSError."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
