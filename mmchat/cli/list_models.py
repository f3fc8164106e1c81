"""`mmchat list`: the models that are known, and which of them are on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmchat.cli import console, options
from mmchat.words import count, size

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.hub.holdings import Holding

Model = dict[str, Any]  # what --json says of one
COLUMNS = ("NAME", "KIND", "PARAMETERS", "IMAGE", "ON DISK", "FORMAT", "ALIASES")


def list_models(as_json: options.Json = False) -> None:
    """List the known models and what is present on disk."""
    models = [*_known(), *_kept(), *_of_ollama()]
    if as_json:
        console.print_json(models)
        return
    rows = [_row(model) for model in models]
    if console.is_terminal(sys.stdout):
        _print_table(rows)
    else:
        console.print_table(COLUMNS, rows, right=())


def _known() -> Iterator[Model]:
    """What has a params file, and what else mmchat downloaded."""
    from mmchat.catalog.known import folder_on_disk, known_specs
    from mmchat.checkpoints.hub_cache import weight_files
    from mmchat.hub.holdings import Holding, holding, recorded_repos

    specs = known_specs()
    for spec in specs:
        held = holding(spec.repo) if spec.repo else Holding("absent")
        if spec.repo is None and (folder := folder_on_disk(spec)):
            size = sum(file.stat().st_size for file in weight_files(folder))
            held = Holding("present", folder, ("safetensors",), size)
        yield _model(spec.name, held, spec.repo, spec)
    for repo in recorded_repos():
        if all(repo != spec.repo for spec in specs):
            yield _model(repo, _whole(repo), repo)


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


def _kept() -> Iterator[Model]:
    """Rounded weights that `mmchat export --keep` wrote."""
    from mmchat.catalog.kept import kept_exports
    from mmchat.hub.holdings import Holding

    for found in kept_exports():
        size = sum(file.size for file in found.files.values())
        how = found.record.scheme + ", calibrated" * bool(found.record.calibrate)
        held = Holding("present", found.path, (how,), size)
        yield _model(found.path.name, held)


def _of_ollama() -> Iterator[Model]:
    """What Ollama has of the families that are read from its files."""
    from mmchat.checkpoints.ollama_folder import ollama_models
    from mmchat.hub.holdings import Holding
    from mmchat.models.registry import FAMILIES

    for model in ollama_models():
        if model.family in FAMILIES:
            formats = (" ".join(filter(None, ("Ollama", model.kind))),)
            held = Holding("unrecorded", model.weights, formats, model.size)
            yield _model(model.name, held)


def _model(
    name: str, held: Holding, repo: str | None = None, spec: ModelSpec | None = None
) -> Model:
    """held: what is there of it. repo: of the Hub."""
    return {
        "name": name,
        "model_type": spec.model_type if spec else None,
        "description": spec.description if spec else None,
        "chat_format": spec.chat_format if spec else None,
        "parameters": spec.parameters if spec else None,
        "image_size": spec.family.describe(spec.config).image_size if spec else None,
        "aliases": list(spec.aliases) if spec else [],
        "repo": repo,
        "state": held.state,
        "formats": list(held.formats),
        "commit": held.commit,
        "path": str(held.folder) if held.folder else None,
        "bytes": None if held.state in ("absent", "unreadable") else held.bytes,
    }


def _row(model: Model) -> tuple[str, ...]:
    parameters, side, state = model["parameters"], model["image_size"], model["state"]
    on_disk = "no" if state == "absent" else state
    if model["bytes"] is not None:
        on_disk = "incomplete, " * (state == "incomplete") + size(model["bytes"])
    return (
        model["name"],
        model["chat_format"] or "",
        "" if parameters is None else count(parameters),
        "" if side is None else f"{side} px",
        on_disk,
        ", ".join(model["formats"]),
        ", ".join(model["aliases"]),
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """A row for each model and its aliases below it; what one must type is never cut."""
    header, *lines = console.table_rows(COLUMNS[:-1], [row[:-1] for row in rows], right={2, 3})
    console.write_out(header + "\n")
    for line, row in zip(lines, rows, strict=True):
        aliases = console.wrapped(f"  or {row[-1]}", "  ")
        console.write_out(f"{line}\n" + (f"{aliases}\n" if row[-1] else ""))
