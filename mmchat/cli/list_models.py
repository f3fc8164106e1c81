"""`mmchat list`: the models that are known, and which of them are on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmchat.cli import console, options
from mmchat.words import count, size

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.hub.holdings import Holding

COLUMNS = ("NAME", "KIND", "PARAMETERS", "IMAGE", "ON DISK", "FORMAT", "ALIASES")


def list_models(as_json: options.Json = False) -> None:
    """List the known models and what is present on disk."""
    models = _entries()
    if as_json:
        console.print_json([_record(model) for model in models])
        return
    rows = [_row(model) for model in models]
    if console.is_terminal(sys.stdout):
        _print_table(rows)
    else:
        console.print_table(COLUMNS, rows, right=())


@dataclass(frozen=True)
class Entry:
    """A model with a params file, or else one that mmchat downloaded or kept or that Ollama has,
    and what is there of it. repo: of the Hub."""

    name: str
    spec: ModelSpec | None
    held: Holding
    repo: str | None


def _entries() -> list[Entry]:
    from mmchat.catalog.known import folder_on_disk, known_specs
    from mmchat.checkpoints.hub_cache import weight_files
    from mmchat.hub.holdings import Holding, holding, recorded_repos

    entries = []
    for spec in known_specs():
        held = holding(spec.repo) if spec.repo else Holding("absent")
        if spec.repo is None and (folder := folder_on_disk(spec)):
            size = sum(file.stat().st_size for file in weight_files(folder))
            held = Holding("present", folder, ("safetensors",), size)
        entries.append(Entry(spec.name, spec, held, spec.repo))
    known = {entry.spec.repo for entry in entries if entry.spec}
    found = [repo for repo in recorded_repos() if repo not in known]
    entries += (Entry(repo, None, _whole(repo), repo) for repo in found)
    return [*entries, *_kept_entries(), *_ollama_entries()]


def _whole(repo: str) -> Holding:
    """What is here of a repository, incomplete without that of its vision encoder."""
    from mmchat.catalog.find import companion_of
    from mmchat.checkpoints.hub_cache import cached_snapshot
    from mmchat.hub.holdings import holding

    held = holding(repo)
    config = held.folder / "config.json" if held.state == "present" and held.folder else None
    beside = config and companion_of(repo, config)
    is_lacking = beside and cached_snapshot(beside) is None
    return replace(held, state="incomplete") if is_lacking else held


def _kept_entries() -> Iterator[Entry]:
    """Rounded weights that `mmchat export --keep` wrote."""
    from mmchat.catalog.kept import kept_exports
    from mmchat.hub.holdings import Holding

    for found in kept_exports():
        size = sum(file.size for file in found.files.values())
        how = found.record.scheme + ", calibrated" * bool(found.record.calibrate)
        held = Holding("present", found.path, (how,), size)
        yield Entry(found.path.name, None, held, None)


def _ollama_entries() -> Iterator[Entry]:
    """What Ollama has of the families that are read from its files."""
    from mmchat.checkpoints.ollama_folder import ollama_models
    from mmchat.hub.holdings import Holding
    from mmchat.models.registry import FAMILIES

    for model in ollama_models():
        if model.family in FAMILIES:
            formats = (" ".join(filter(None, ("Ollama", model.kind))),)
            held = Holding("unrecorded", model.weights, formats, model.size)
            yield Entry(model.name, None, held, None)


def _record(entry: Entry) -> dict[str, Any]:
    spec, held = entry.spec, entry.held
    return {
        "name": entry.name,
        "model_type": spec.model_type if spec else None,
        "description": spec.description if spec else None,
        "chat_format": spec.chat_format if spec else None,
        "parameters": spec.parameters if spec else None,
        "image_size": spec.family.describe(spec.config).image_size if spec else None,
        "aliases": list(spec.aliases) if spec else [],
        "repo": entry.repo,
        "state": held.state,
        "formats": list(held.formats),
        "commit": held.commit,
        "path": str(held.folder) if held.folder else None,
        "bytes": None if held.state in ("absent", "unreadable") else held.bytes,
    }


def _row(entry: Entry) -> tuple[str, ...]:
    spec, held = entry.spec, entry.held
    on_disk = "no" if held.state == "absent" else size(held.bytes)
    if held.state == "incomplete":
        on_disk = f"incomplete, {on_disk}"
    elif held.state == "unreadable":
        on_disk = held.state
    return (
        entry.name,
        spec.chat_format if spec else "",
        count(spec.parameters) if spec else "",
        f"{spec.family.describe(spec.config).image_size} px" if spec else "",
        on_disk,
        ", ".join(held.formats),
        ", ".join(spec.aliases) if spec else "",
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """A row for each model and its aliases below it; what one must type is never cut."""
    header, *lines = console.table_rows(COLUMNS[:-1], [row[:-1] for row in rows], right={2, 3})
    console.write_out(header + "\n")
    for line, row in zip(lines, rows, strict=True):
        aliases = console.wrapped(f"  or {row[-1]}", "  ")
        console.write_out(f"{line}\n" + (f"{aliases}\n" if row[-1] else ""))
