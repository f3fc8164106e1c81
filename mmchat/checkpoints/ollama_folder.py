"""Ollama's folder of models: manifests by name, and blobs by hash. It is read, never written to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat import limits
from mmchat.errors import CheckpointError, quoted
from mmchat.strict_json import Where, as_object, read_json

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"(?:(?:(?P<host>{_PART}(?::\d+)?)/)?(?P<space>{_PART})/)?(?P<model>{_PART})"
                   rf"(?::(?P<tag>{_PART}))?")  # fmt: skip
_HOST, _SPACE, _TAG = "registry.ollama.ai", "library", "latest"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_KIND = "application/vnd.ollama.image."
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # of Ollama as a service of Linux


@dataclass(frozen=True)
class OllamaModel:
    """A model in Ollama's folder. name: as Ollama shows it. weights, projector: GGUF files; size:
    their bytes. family, kind: what Ollama says of its architecture and quantisation, or "".
    sampling: temperature and top_p, where its own are recorded."""

    name: str
    weights: Path
    projector: Path | None
    size: int
    family: str
    kind: str
    sampling: Mapping[str, Any]


def ollama_folders() -> list[Path]:
    """Where Ollama keeps models on this machine: its variable, or else the usual places."""
    if given := os.environ.get("OLLAMA_MODELS"):
        return [Path(given.replace("\0", "")).expanduser()]
    own = Path(os.path.expanduser("~")) / ".ollama" / "models"  # noqa: PTH111 - raises nothing
    return [own, _SERVICE]


def ollama_model(name: str) -> OllamaModel | None:
    """The model that Ollama calls so: [host/][namespace/]model[:tag]; None if it has none.

    A name without a tag means "latest", or the only tag that is there. Raises CheckpointError for
    a model that is damaged, or made of parts that cannot be read.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        return None
    host, space, model, tag = match.group("host", "space", "model", "tag")
    below = Path(host or _HOST, space or _SPACE, model)
    for folder in ollama_folders():
        place = folder / "manifests" / below
        with suppress(OSError):
            found = [place / (tag or _TAG)]
            if tag is None and not found[0].is_file():
                found = [path for path in place.iterdir() if path.is_file()]
            if len(found) == 1 and found[0].is_file():
                return _read(folder, found[0])
    return None


def ollama_models() -> Iterator[OllamaModel]:
    """All that are whole, of any architecture."""
    for folder in ollama_folders():
        manifests: list[Path] = []
        with suppress(OSError):
            manifests = sorted((folder / "manifests").glob("*/*/*/*"))[: limits.OLLAMA_MODELS]
        for path in manifests:
            with suppress(CheckpointError, OSError):
                if path.is_file():
                    yield _read(folder, path)


def unreadable_folder() -> Path | None:
    """A folder of Ollama's that is there and may not be read by this user."""
    for folder in ollama_folders():
        try:
            next((folder / "manifests").iterdir(), None)
        except PermissionError:
            return folder
        except OSError:
            continue
    return None


def _read(folder: Path, path: Path) -> OllamaModel:
    """The model of a manifest, whose blobs are there in their sizes."""
    where = Where(str(path), error=CheckpointError)
    manifest = as_object(read_json(path, where), where)
    layers = manifest.get("layers")
    if not isinstance(layers, list):
        raise where.child("layers").fail("expected a list")
    blobs: dict[str, list[Path]] = {}
    for index, layer in enumerate(layers):
        at = where.child("layers").child(index)
        kind = str(as_object(layer, at).get("mediaType")).removeprefix(_KIND)
        blobs.setdefault(kind, []).append(_blob(folder, layer, at))
    name = _name(folder, path)
    if len(blobs.get("model", ())) != 1 or len(blobs.get("projector", ())) > 1:
        raise where.fail(f"{quoted(name)} is not one file of weights, or two; mmchat reads these")
    if "adapter" in blobs:
        raise where.fail(f"{quoted(name)} has a LoRA adapter in GGUF, which mmchat does not read")
    parts = [blobs["model"][0], *blobs.get("projector", ())]
    about: dict[str, Any] = {}
    with suppress(CheckpointError):
        about = _small(_blob(folder, as_object(manifest.get("config"), where), where))
    params = _small(blobs["params"][0]) if "params" in blobs else {}
    return OllamaModel(
        name,
        parts[0],
        parts[1] if len(parts) > 1 else None,
        sum(part.stat().st_size for part in parts),
        str(about.get("model_family", "")),
        str(about.get("file_type", "")),
        {key: params[key] for key in ("temperature", "top_p") if key in params},
    )


def _blob(folder: Path, layer: Mapping[str, Any], where: Where) -> Path:
    """The file of a layer. Raises where's error unless it has the size that is recorded."""
    digest, size = layer.get("digest"), layer.get("size")
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise where.child("digest").fail(f"{quoted(digest)} is no hash")
    blob = folder / "blobs" / f"sha256-{match[1]}"
    try:
        found = blob.stat().st_size
    except OSError as error:
        raise where.fail(
            f"{quoted(blob, 300)} cannot be read: {error.strerror}; pull the model again, or let"
            " this user read it"
        ) from None
    if found != size:
        raise where.fail(
            f"{quoted(blob, 300)} has {found:,} bytes, {quoted(size)} are recorded; pull the model"
            " again"
        )
    return blob


def _small(blob: Path) -> dict[str, Any]:
    """The object in a blob of JSON. Raises CheckpointError."""
    where = Where(str(blob), error=CheckpointError)
    return as_object(read_json(blob, where), where)


def _name(folder: Path, path: Path) -> str:
    """As Ollama shows it: what is usual is left out."""
    host, space, model, tag = path.relative_to(folder / "manifests").parts
    front = "" if (host, space) == (_HOST, _SPACE) else f"{space}/"
    return f"{'' if host == _HOST else f'{host}/'}{front}{model}:{tag}"
