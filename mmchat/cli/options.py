"""Arguments and options shared by the commands, each with its name, range and help in one place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmchat import limits
from mmchat.cli import console
from mmchat.cli.wrong_names import model_name
from mmchat.input_text import checked
from mmchat.offline import go_offline
from mmchat.quant import schemes

INPUT = "Input"
MODEL = "Model"
OUTPUT = "Output"

# Filled by --debug on whichever command it is given.
debug_requested: set[bool] = set()


def _request_debug(asked: bool) -> None:
    if asked:
        debug_requested.add(True)


def _set_color(mode: console.ColorMode) -> None:
    console.set_color(mode)


def _go_offline(asked: bool) -> None:
    if asked:
        go_offline()


def _system(text: str | None) -> str | None:
    return None if text is None else checked(text, "--system")


def complete_scheme(incomplete: str) -> list[str]:
    """Quantisation schemes that begin so."""
    return [name for name in schemes.SCHEMES if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Names and aliases that begin so, each with the description of the model."""
    from mmchat.catalog.find import known_specs

    return [
        (name, spec.description)
        for spec in known_specs()
        for name in (spec.name, *spec.aliases)
        if name.startswith(incomplete)
    ]


# What the command line adds to options of LoadOptions, by their names.
ADDED: Mapping[str, Mapping[str, Any]] = {
    "name": {"autocompletion": complete_model, "callback": model_name},
    "quantize": {"autocompletion": complete_scheme},
}

Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_request_debug, help="Show tracebacks.", rich_help_panel=OUTPUT
    ),
]
Color = Annotated[
    console.ColorMode,
    typer.Option("--color", callback=_set_color, help="Colours.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No notes on stderr.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)
]
RecordFile = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write JSON to FILE as well.", rich_help_panel=OUTPUT
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write to FILE, not stdout.", rich_help_panel=OUTPUT
    ),
]

Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_go_offline,
        help="Ask no network; HF_HUB_OFFLINE=1 does the same.",
        rich_help_panel=MODEL,
    ),
]

Prompt = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="The question. Text on stdin comes before it, or replaces it.",
        rich_help_panel=INPUT,
    ),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "-i",
        "--image-prompt",
        "--image-prompts",
        "--image",
        metavar="PATH|URL|-",
        help="A picture; repeatable. '-' reads its bytes from stdin.",
        rich_help_panel=INPUT,
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "-s",
        "--system",
        metavar="TEXT",
        callback=_system,
        help="System message.",
        rich_help_panel=INPUT,
    ),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="No chat format: the prompt as it is (base models).", rich_help_panel=INPUT
    ),
]
Logprobs = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=int(limits.SAMPLING["logprobs"][0]),
        max=int(limits.SAMPLING["logprobs"][1]),
        help="With --json: the N likeliest at every token.",
        rich_help_panel=OUTPUT,
    ),
]
StreamJson = Annotated[
    bool,
    typer.Option("--stream-json", help="One JSON line per token.", rich_help_panel=OUTPUT),
]
NoStream = Annotated[
    bool,
    typer.Option("--no-stream", help="Print the answer when it is whole.", rich_help_panel=OUTPUT),
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Timings per stage on stderr.", rich_help_panel=OUTPUT),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show prompt tokens, tile grids and memory; load no weights.",
        rich_help_panel=OUTPUT,
    ),
]
