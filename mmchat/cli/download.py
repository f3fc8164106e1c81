"""`mmchat download`: fetch a model; the folder's path alone goes to stdout."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat.cli import console, options
from mmchat.cli.transfer_bars import TransferBars, transfer_bars
from mmchat.cli.wrong_names import model_name
from mmchat.errors import MmchatError, UsageError, quoted
from mmchat.words import plural, size

if TYPE_CHECKING:
    from mmchat.hub.download import Plan, Request

_which = partial(typer.Option, rich_help_panel="Which files")
_how = partial(typer.Option, rich_help_panel="How")
_TOKEN_HELP = "Access token; HF_TOKEN or 'hf auth login' keep it out of sight."  # noqa: S105
_INCLUDE_HELP = "Only files that match, in place of the usual choice. Repeatable."


@dataclass(frozen=True)
class Selection:
    """Which files of a repository, and where they go."""

    revision: Annotated[str, _which(metavar="REV", help="Branch, tag or whole commit.")] = "main"
    weights_format: Annotated[
        Literal["safetensors", "original"],
        _which("--format", help="The form of the weights; one is fetched."),
    ] = "safetensors"
    include: Annotated[list[str] | None, _which(metavar="PATTERN", help=_INCLUDE_HELP)] = None
    exclude: Annotated[
        list[str] | None, _which(metavar="PATTERN", help="Not the files that match.")
    ] = None
    local_dir: Annotated[
        Path | None, _how(metavar="DIR", help="Put the files into DIR, not the Hugging Face cache.")
    ] = None
    token: Annotated[str | None, _how(metavar="TOKEN", help=_TOKEN_HELP)] = None

    def request(self, model: str) -> Request:
        """What is meant of a model or repository. Raises UsageError, ParamsError."""
        from mmchat.catalog.known import repo_of
        from mmchat.hub.download import Request

        if self.include and self.weights_format != "safetensors":
            raise UsageError("--include names the files itself; leave --format out")
        patterns = tuple(self.include or ()), tuple(self.exclude or ())
        folder = self.local_dir.expanduser().resolve() if self.local_dir else None
        repo = repo_of(model)
        return Request(repo, self.revision, self.weights_format, *patterns, folder, self.token)


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REPO",
            help="Name or alias of a model, or owner/name.",
            callback=model_name,
        ),
    ],
    selection: Selection,
    max_workers: Annotated[int, _how(metavar="N", min=1, max=16, help="Files at a time.")] = 4,
    offline: options.Offline = False,
    dry_run: Annotated[
        bool, _how("--dry-run", help="Say what would be fetched; fetch nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Download a model into the Hugging Face cache, which other tools share.

    Stop it with Ctrl-C and run it again: it goes on where it stopped. Every file is checked against
    the Hub's hash. The path of the folder is printed on stdout.
    """
    from mmchat.hub import download as hub
    from mmchat.models.registry import packing_for

    done = []
    with console.interrupt_says("stopped; run the same command to go on"):
        request: Request | None = selection.request(model)
        while request is not None:
            plan, fetched = hub.plan(request, packing_for), 0
            if not quiet:
                say_plan(plan, dry_run)
            if dry_run:
                plan.check_space()
            else:
                fetched = carry_out(plan, max_workers, quiet=quiet).arrived
            done.append((plan, fetched))
            request = None if len(done) > 1 else _companion(model, plan)
    if not quiet and not dry_run:
        plan = done[0][0]
        _say_adapter(str(plan.folder) if selection.local_dir else model, plan.folder)
    records = [_record(plan, dry_run, fetched) for plan, fetched in done]
    if as_json:
        beside = {"companion": records[1]} if len(records) > 1 else {}
        console.print_json(records[0] | beside)
    else:
        console.print_path(done[0][0].folder)


def _companion(model: str, plan: Plan) -> Request | None:
    """What is to be fetched beside a model, whose weights are not complete without it."""
    from mmchat.catalog.find import companion_of
    from mmchat.hub.download import Request

    if not plan.request.selections:  # single files, by name
        return None
    repo = companion_of(model, plan.folder / "config.json")  # not there in a dry run
    if repo is None:
        return None
    console.note(f"{model} needs the vision encoder {repo} as well")
    return Request(repo, token=plan.request.token)


def _say_adapter(model: str, folder: Path) -> None:
    """What an adapter is of, and how it runs."""
    from mmchat.catalog.adapters import base_names, is_alone

    with suppress(MmchatError):  # loading says what is wrong
        if is_alone(folder):
            console.note(
                f"an adapter of {quoted(base_names(folder)[0])};"
                f" 'mmchat chat {shlex.quote(model)}' runs it"
            )


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
    if plan.packing:
        console.note(
            f"the weights are packed by {plan.packing.label}; they are loaded as"
            f" {plan.packing.scheme}, or as they are with --quantize none, in 16 bits"
        )
    kept = f", {size(plan.kept_bytes)} of them kept from before" if plan.kept_bytes else ""
    console.note(
        f"{'would fetch' if dry_run else 'fetching'} {plural(len(plan.missing), 'file')},"
        f" {size(plan.fetch_bytes + plan.kept_bytes)}{kept}; {size(plan.free_bytes)} free in"
        f" {plan.folder}"
    )


def _record(plan: Plan, dry_run: bool, fetched: int) -> dict[str, Any]:
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
            {"path": f.path, "bytes": f.size, "etag": f.etag, "was_there": f not in plan.missing}
            for f in plan.files
        ],
    }
