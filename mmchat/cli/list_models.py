"""`mmchat list`: the models that are known, and which of them are on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mmchat.cli import console, options
from mmchat.cli.units import count, size

if TYPE_CHECKING:
    from mmchat.params import KnownModel

COLUMNS = ("NAME", "KIND", "PARAMETERS", "TILE", "ON DISK", "ALIASES")


def list_models(
    as_json: options.Json = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """List the known models and what is present on disk."""
    from mmchat.params import known_models

    models = known_models()
    if as_json:
        console.print_json([_record(model) for model in models])
        return
    rows = [_row(model) for model in models]
    if console.is_terminal(sys.stdout):
        _print_table(rows)
    else:
        for row in (COLUMNS, *rows):
            console.write_out("\t".join(row) + "\n")


def _record(model: KnownModel) -> dict[str, Any]:
    params = model.params
    return {
        "name": params.name,
        "model_type": params.model_type,
        "description": params.description,
        "chat_format": params.chat_format,
        "parameters": params.parameters,
        "tile_size": params.tile_size,
        "aliases": list(params.aliases),
        "repo": params.repo,
        "path": str(model.path) if model.path else None,
        "bytes": model.size if model.path else None,
    }


def _row(model: KnownModel) -> tuple[str, ...]:
    params = model.params
    return (
        params.name,
        params.chat_format,
        count(params.parameters),
        f"{params.tile_size} px",
        size(model.size) if model.present else "no",
        ", ".join(params.aliases),
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        right = column in ("PARAMETERS", "TILE", "ON DISK")
        table.add_column(column, justify="right" if right else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.stdout_console().print(table)
