"""`mmchat download`: fetch a model; the folder's path alone goes to stdout."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat.cli import console, options
from mmchat.cli.wrong_names import model_name
from mmchat.errors import MmchatError, UsageError, quoted
from mmchat.terminal import sanitize
from mmchat.words import plural, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mmchat.hub.download import Plan, Request

NAME_WIDTH = 36  # columns
_which = partial(typer.Option, rich_help_panel="Which files")
_how = partial(typer.Option, rich_help_panel="How")
_TOKEN_HELP = "Access token; HF_TOKEN or 'hf auth login' keep it out of sight."  # noqa: S105
_INCLUDE_HELP = "Only files that match, in place of the usual choice. Repeatable."


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REPO",
            help="Name or alias of a model, or owner/name.",
            callback=model_name,
        ),
    ],
    revision: Annotated[str, _which(metavar="REV", help="Branch, tag or whole commit.")] = "main",
    weights_format: Annotated[
        Literal["safetensors", "original"],
        _which("--format", help="The form of the weights; one is fetched."),
    ] = "safetensors",
    include: Annotated[list[str] | None, _which(metavar="PATTERN", help=_INCLUDE_HELP)] = None,
    exclude: Annotated[
        list[str] | None, _which(metavar="PATTERN", help="Not the files that match.")
    ] = None,
    local_dir: Annotated[
        Path | None, _how(metavar="DIR", help="Put the files into DIR, not the Hugging Face cache.")
    ] = None,
    token: Annotated[str | None, _how(metavar="TOKEN", help=_TOKEN_HELP)] = None,
    max_workers: Annotated[int, _how(min=1, max=16, help="Files at a time.")] = 4,
    offline: options.Offline = False,
    dry_run: Annotated[bool, _how(help="Say what would be fetched; fetch nothing.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Download a model into the Hugging Face cache, which other tools share.

    Stop it with Ctrl-C and run it again: it goes on where it stopped. Every file is checked against
    the Hub's hash. The path of the folder is printed on stdout.
    """
    from mmchat.catalog.known import repo_of
    from mmchat.hub import download as hub
    from mmchat.models.registry import packing_for

    if include and weights_format != "safetensors":
        raise UsageError("--include names the files itself; leave --format out")
    patterns = tuple(include or ()), tuple(exclude or ())
    folder = local_dir.expanduser().resolve() if local_dir else None
    wanted = [hub.Request(repo_of(model), revision, weights_format, *patterns, folder, token)]
    done = []
    with console.interrupt_says("stopped; run the same command to go on"):
        for request in wanted:
            plan, fetched = hub.plan(request, packing_for), 0
            say_plan(plan, dry_run)
            if dry_run:
                plan.check_space()
            else:
                fetched = carry_out(plan, max_workers).arrived
            done.append((plan, fetched))
            if len(done) == 1 and (companion := _companion(model, plan)):
                wanted.append(companion)
    if not dry_run:
        plan = done[0][0]
        _say_adapter(str(plan.folder) if local_dir else model, plan.folder)
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
    console.say(f"{model} needs the vision encoder {repo} as well")
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


def carry_out(plan: Plan, workers: int = 4) -> TransferBars:
    """Fetch what a plan lacks, with bars."""
    from mmchat.hub import download as hub

    sizes = {file.path: file.size for file in plan.missing}
    with transfer_bars(sizes, plan.fetch_bytes) as bars:
        waiting = "another mmchat is fetching this model; waiting for it"
        hub.carry_out(plan, workers, bars.report, lambda: bars.note(waiting))
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


class TransferBars:
    """One bar for each file that moves, and one for all; made by `transfer_bars`."""

    def __init__(self, progress: Progress, sizes: dict[str, int], total: int) -> None:
        self._progress = progress
        self._sizes = sizes
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self.arrived = 0  # bytes of this run
        self._all = progress.add_task("all", total=total)

    def note(self, text: str) -> None:
        """A line on stderr, above the bars."""
        if self._progress.disable:
            console.note(text)
        else:
            self._progress.console.print(sanitize(text), style="dim")

    def report(self, path: str, count: int) -> None:
        """`count` bytes of `path` came; called from several threads."""
        with self._lock:
            self.arrived += max(count, 0)
            if path not in self._tasks:
                label = sanitize(path)[-NAME_WIDTH:]
                self._tasks[path] = self._progress.add_task(label, total=self._sizes.get(path))
            self._progress.advance(self._tasks[path], count)
            self._progress.advance(self._all, count)
            task = next(t for t in self._progress.tasks if t.id == self._tasks[path])
            if task.finished:
                self._progress.update(task.id, visible=False)


@contextmanager
def transfer_bars(sizes: dict[str, int], total: int) -> Iterator[TransferBars]:
    """sizes: bytes of each file; total: bytes that will come."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    hidden = not (total and console.shows_progress())
    screen = console.rich_console()
    with rich.Progress(*columns, console=screen, transient=True, disable=hidden) as progress:
        yield TransferBars(progress, sizes, total)
