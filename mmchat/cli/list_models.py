"""`mmchat list`: the models that are known, and which of them are on this machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmchat.cli import console, options
from mmchat.terminal import filled
from mmchat.words import count, size

if TYPE_CHECKING:
    from mmchat.catalog.find import ModelParams
    from mmchat.hub.holdings import Holding

COLUMNS = ("NAME", "KIND", "PARAMETERS", "TILE", "ON DISK", "FORMAT", "ALIASES")


def list_models(
    as_json: options.Json = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """List the known models and what is present on disk."""
    models = _entries()
    if as_json:
        console.print_json([_record(model) for model in models])
        return
    rows = [_row(model) for model in models]
    if console.is_terminal(sys.stdout):
        _print_table(rows)
    else:
        for row in (COLUMNS, *rows):
            console.write_out("\t".join(row) + "\n")


@dataclass(frozen=True)
class Entry:
    """A model with a params file, or else one that mmchat downloaded, and what is there of it."""

    name: str
    params: ModelParams | None
    held: Holding


def _entries() -> list[Entry]:
    from mmchat.catalog.find import known_models
    from mmchat.hub.holdings import Holding, holding, recorded_repos

    entries = []
    for model in known_models():
        repo = model.params.repo
        if repo is None:
            formats = ("safetensors",) if model.present else ()
            state = "present" if model.present else "absent"
            held = Holding(state, model.path, formats, model.size)
        else:
            held = holding(repo)
        entries.append(Entry(model.params.name, model.params, held))
    known = {entry.params.repo for entry in entries if entry.params}
    found = [repo for repo in recorded_repos() if repo not in known]
    return [*entries, *(Entry(repo, None, holding(repo)) for repo in found)]


def _record(entry: Entry) -> dict[str, Any]:
    params, held = entry.params, entry.held
    return {
        "name": entry.name,
        "model_type": params.model_type if params else None,
        "description": params.description if params else None,
        "chat_format": params.chat_format if params else None,
        "parameters": params.parameters if params else None,
        "tile_size": params.family.describe(params.config).image_size if params else None,
        "aliases": list(params.aliases) if params else [],
        "repo": params.repo if params else entry.name,
        "state": held.state,
        "formats": list(held.formats),
        "commit": held.commit,
        "path": str(held.folder) if held.folder else None,
        "bytes": None if held.state == "absent" else held.bytes,
    }


def _row(entry: Entry) -> tuple[str, ...]:
    params, held = entry.params, entry.held
    on_disk = "no" if held.state == "absent" else size(held.bytes)
    if held.state == "incomplete":
        on_disk = f"incomplete, {on_disk}"
    return (
        entry.name,
        params.chat_format if params else "",
        count(params.parameters) if params else "",
        f"{params.family.describe(params.config).image_size} px" if params else "",
        on_disk,
        ", ".join(held.formats),
        ", ".join(params.aliases) if params else "",
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """A row for each model and its aliases below it; what one must type is never cut."""
    header, *cells = ([*row[:4], " ".join(filter(None, row[4:6]))] for row in (COLUMNS, *rows))
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    columns = console.terminal_size()[0]
    gap = "  " if sum(widths) + 4 * 2 <= columns else " "

    def line(row: list[str]) -> str:
        name, kind, count_, tile, disk = row
        left = f"{name:<{widths[0]}}{gap}{kind:<{widths[1]}}{gap}{count_:>{widths[2]}}"
        left = f"{left}{gap}{tile:>{widths[3]}}"
        beside = f"{left}{gap}{disk}".rstrip()
        return (beside if len(beside) <= columns else f"{left.rstrip()}\n  {disk}") + "\n"

    console.write_out(console.bold(line(header).rstrip()) + "\n")
    for row, cell in zip(rows, cells, strict=True):
        aliases = filled(f"  or {row[-1]}", columns, indent="  ")
        console.write_safely(line(cell) + (f"{aliases}\n" if row[-1] else ""))
