"""`mmchat convert`: translate a model between Meta's format and the Hub's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmchat.cli import console, options
from mmchat.cli.interrupts import interrupt_says
from mmchat.cli.option_groups import Only, with_option_groups
from mmchat.cli.wrong_names import model_name
from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions

CONVERSION = "Conversion"


@with_option_groups
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PATH", help="Name, folder or weights file.", callback=model_name
        ),
    ],
    to: Annotated[
        Literal["hf", "meta"],
        typer.Option(
            "--to",
            help="hf: safetensors and config.json; meta: consolidated.00.pth, params.json.",
            rich_help_panel=CONVERSION,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The new folder; else NAME-hf or NAME-meta here.",
            rich_help_panel=CONVERSION,
        ),
    ] = None,
    max_shard_size: Annotated[
        float,
        typer.Option(
            metavar="GB",
            min=0.000001,
            help="Largest safetensors file.",
            rich_help_panel=CONVERSION,
        ),
    ] = 5.0,
    *,
    given: Annotated[LoadOptions, Only("params_path", "tokenizer_path")],
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Write a model in the other format; the new folder's path goes to stdout.

    Works through one tensor at a time, compares what it wrote bit for bit, and the folder appears
    only when it is whole.
    """
    from mmchat.convert import convert as run

    source = replace(given, name=model).find()
    folder = (output or Path(f"{source.params.name}-{to}")).expanduser().absolute()
    if folder.name in ("", ".", ".."):
        raise UsageError("--output must name a new folder")
    with interrupt_says("stopped; nothing was written"), console.Stages(quiet=quiet) as stages:

        def show(stage: str, done: int, total: int) -> None:
            stages.show(f"{stage}: {done} of {total} tensors")

        shard_bytes = int(max_shard_size * 1e9)
        notes = run(source, to, folder, max_shard_bytes=shard_bytes, progress=show)
    if not quiet:
        for note in notes:
            console.note(note)
    console.write_safely(f"{folder}\n")
