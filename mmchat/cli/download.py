"""`mmchat download`: fetch a model; the folder's path alone goes to stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat.cli import console, options
from mmchat.cli.interrupts import interrupt_says
from mmchat.cli.transfer_bars import TransferBars, transfer_bars
from mmchat.cli.wrong_names import model_name
from mmchat.errors import UsageError
from mmchat.words import plural, size

if TYPE_CHECKING:
    from mmchat.hub.download import Plan

SELECTION = "Which files"
TRANSFER = "How"


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REPO",
            help="Name or alias of a model, or owner/name.",
            callback=model_name,
        ),
    ],
    revision: Annotated[
        str,
        typer.Option(metavar="REV", help="Branch, tag or whole commit.", rich_help_panel=SELECTION),
    ] = "main",
    weights_format: Annotated[
        Literal["safetensors", "original"],
        typer.Option(
            "--format", help="The form of the weights; one is fetched.", rich_help_panel=SELECTION
        ),
    ] = "safetensors",
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only files that match, in place of the usual choice. Repeatable.",
            rich_help_panel=SELECTION,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Not the files that match.", rich_help_panel=SELECTION
        ),
    ] = None,
    local_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Put the files into DIR, not the Hugging Face cache.",
            rich_help_panel=TRANSFER,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Access token; HF_TOKEN or 'hf auth login' keep it out of sight.",
            rich_help_panel=TRANSFER,
        ),
    ] = None,
    max_workers: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=16, help="Files at a time.", rich_help_panel=TRANSFER),
    ] = 4,
    offline: options.Offline = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be fetched; fetch nothing.", rich_help_panel=TRANSFER
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Download a model into the Hugging Face cache, which other tools share.

    Stop it with Ctrl-C and run it again: it goes on where it stopped. Every file is checked against
    the Hub's hash. The path of the folder is printed on stdout.
    """
    from mmchat.catalog.find import repo_of
    from mmchat.hub import download as hub

    if include and weights_format != "safetensors":
        raise UsageError("--include names the files itself; leave --format out")
    request = hub.Request(
        repo_of(model),
        revision,
        weights_format,
        tuple(include or ()),
        tuple(exclude or ()),
        local_dir.expanduser().resolve() if local_dir else None,
        token,
    )
    with interrupt_says("stopped; run the same command to go on"):
        plan = hub.plan(request)
        if not quiet:
            say_plan(plan, dry_run)
        if dry_run:
            plan.check_space()
            bars = None
        else:
            bars = carry_out(plan, max_workers, quiet=quiet)
    if as_json:
        console.print_json(_record(plan, dry_run, bars.arrived if bars else 0))
    else:
        console.write_out(f"{console.for_stream(str(plan.folder), sys.stdout)}\n")


def carry_out(plan: Plan, workers: int = 4, *, quiet: bool = False) -> TransferBars:
    """Fetch what a plan lacks, with bars."""
    from mmchat.hub import download as hub

    sizes = {file.path: file.size for file in plan.missing}
    with transfer_bars(sizes, plan.fetch_bytes, quiet=quiet) as bars:
        waiting = lambda: bars.note("another mmchat is fetching this model; waiting for it")  # noqa: E731
        hub.carry_out(plan, workers, bars.report, (lambda: None) if quiet else waiting)
    return bars


def say_plan(plan: Plan, dry_run: bool = False) -> None:
    """What is there, what will come and how much space there is, on stderr."""
    console.note(f"{plan.request.repo} at commit {plan.commit}")
    if not plan.missing:
        console.note(f"all {len(plan.files)} files are there ({size(plan.total_bytes)})")
        return
    for file in plan.files if dry_run else ():
        mark = "to fetch" if file in plan.missing else "there"
        console.note(f"  {file.path}  {size(file.size)}  {mark}")
    kept = f", {size(plan.kept_bytes)} of them kept from before" if plan.kept_bytes else ""
    console.note(
        f"{'would fetch' if dry_run else 'fetching'} {plural(len(plan.missing), 'file')},"
        f" {size(plan.fetch_bytes + plan.kept_bytes)}{kept}; {size(plan.free_bytes)} free in"
        f" {plan.folder}"
    )


def _record(plan: Plan, dry_run: bool, fetched: int) -> dict[str, Any]:
    missing = set(plan.missing)
    return {
        "repo": plan.request.repo,
        "revision": plan.request.revision,
        "commit": plan.commit,
        "path": str(plan.folder),
        "dry_run": dry_run,
        "total_bytes": plan.total_bytes,
        "missing_bytes": plan.fetch_bytes,
        "fetched_bytes": fetched,
        "free_bytes": plan.free_bytes,
        "files": [
            {"path": file.path, "bytes": file.size, "etag": file.etag, "was_there": was_there}
            for file in plan.files
            for was_there in [file not in missing]
        ],
    }
