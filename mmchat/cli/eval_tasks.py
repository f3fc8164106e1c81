"""`mmchat eval TASK`: benchmarks of lm_eval, in this process."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mmchat
from mmchat.cli import console, model_choice, options
from mmchat.cli.prompt_input import check_model
from mmchat.errors import DiskError, UsageError, disk_errors, quoted
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.catalog.source import ModelSource
    from mmchat.evals.harness import Outcome, Tasks

RESULTS = "results.json"


@dataclass(frozen=True)
class TaskOptions:
    """What is asked, and what is kept of it."""

    limit: Annotated[
        int | None,
        options.of_input(min=1, help="Ask the first N questions of each task."),
    ] = None
    num_fewshot: Annotated[
        int | None, options.of_input(min=0, help="Examples before each question.")
    ] = None
    include_path: Annotated[
        Path | None,
        options.of_input(
            metavar="DIR", help="Task files of your own; they may run Python that lies beside them."
        ),
    ] = None
    raw: options.Raw = False
    rows: options.Rows = None
    cache: Annotated[
        bool, options.of_output(help="Keep answers, so that the same command goes on.")
    ] = False
    output: Annotated[
        Path | None, options.to_file("DIR", "Write results and every question there.")
    ] = None

    def command(self, names: str, model: LoadOptions) -> str:
        """What asks the same of the same weights again."""
        said = options.as_arguments(self, ("limit", "num_fewshot", "include_path", "raw"))
        of_model = options.as_arguments(model, options.LOADING)
        return shlex.join(["mmchat", "eval", names, *said, *of_model])


def tasks(
    names: Annotated[
        str,
        typer.Argument(
            metavar="TASK[,TASK]", help="Tasks, groups or patterns of lm_eval: mmmu_val, 'ai2d*'."
        ),
    ],
    *,
    given: TaskOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run benchmarks of lm_eval (extra mmchat[eval]), with pictures or without.

    Prompts are in the chat format, unless --raw is given or the model is a base. -o writes
    results.json, and samples_TASK.jsonl with every question and answer.
    """
    from mmchat.evals import harness

    wanted = [name for name in dict.fromkeys(names.split(",")) if name]
    if not wanted:
        raise UsageError("no task is given; name one, as in: mmchat eval mmmu_val")
    harness.check_extra()
    if given.output is not None:
        _check_folder(given.output)
    source = model_choice.find_or_offer(model)
    with console.Stages() as stages:
        stages.show("reading tasks")
        found = harness.load_tasks(wanted, given.include_path, given.num_fewshot)
    check_model(source.spec, has_pictures=found.has_pictures)
    if found.has_pictures and model.text_only:
        raise UsageError("--text-only does not fit tasks with pictures; leave it out")
    loaded = model_choice.load_with_notes(model, source)
    if source.spec.chat_format == "base":
        given = replace(given, raw=True)
    goes_on = "the same command goes on" if given.cache else "--cache would have kept answers"
    with console.interrupt_says(f"stopped; {goes_on}"):
        record, outcome = _run(found, given, loaded, source)
    record = {"command": given.command(names, _as_held(loaded)), **record}
    if given.output is not None:
        _write(given.output, record, outcome)
    console.note(*outcome.notices)
    if as_json:
        console.print_json(record)
    else:
        _print_table(harness.metrics(outcome.record), outcome.record["n-samples"])


def _run(
    found: Tasks, given: TaskOptions, loaded: Model, source: ModelSource
) -> tuple[dict[str, Any], Outcome]:
    """(what is recorded, what came of it)."""
    from mmchat.checkpoints.names import COMMIT
    from mmchat.engine.room import usual_rows
    from mmchat.evals import harness

    held = _as_held(loaded)
    folder = source.checkpoint.name if source.checkpoint else ""
    record = {
        "model": source.spec.name,
        "commit": folder if COMMIT.fullmatch(folder) else None,
        "adapters": list(loaded.adapters),
        "dtype": held.dtype,
        "quantize": held.quantize,
        "device": str(loaded.device),
        "max_seq_len": loaded.max_seq_len,
        "chat_format": not given.raw,
        "packages": {name: version(name) for name in ("mmchat", "lm_eval", "torch")},
    }
    said = json.dumps([record, held.identity(source), mmchat.__version__])
    began = time.monotonic()
    outcome = harness.run(
        loaded,
        found,
        rows=given.rows or usual_rows(loaded, loaded.memory),
        limit=given.limit,
        is_chat=not given.raw,
        cache_key=sha256(said.encode()).hexdigest()[:16] if given.cache else None,
        bar=partial(console.progress_bar, "requests"),
    )
    seconds = round(time.monotonic() - began, 3)
    return {**record, "seconds": seconds, "notices": outcome.notices, **outcome.record}, outcome


def _as_held(loaded: Model) -> LoadOptions:
    """The options of loading, with what `auto` was."""
    found = loaded.options
    scheme = found.scheme(loaded.spec, loaded.placement)
    dtype = str(loaded.dtype).removeprefix("torch.")
    return replace(
        found, name=found.name or loaded.spec.name, quantize=scheme, dtype=dtype, progress=None
    )


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DiskError(f"cannot write to {quoted(folder)}: it is no folder; give another name")
    atomic_file.check_writable(folder / RESULTS if folder.is_dir() else folder)


def _write(folder: Path, record: dict[str, Any], outcome: Outcome) -> None:
    with disk_errors(f"cannot make the folder {quoted(folder)}"):
        folder.mkdir(exist_ok=True)
    for task, samples in outcome.samples.items():
        lines = "".join(console.to_json(one) + "\n" for one in samples)
        atomic_file.write_text(folder / f"samples_{task}.jsonl", lines)
    atomic_file.write_text(folder / RESULTS, console.to_json(record) + "\n")


def _print_table(
    metrics: list[tuple[str, str, float, float | None]], asked: dict[str, dict[str, int]]
) -> None:
    cells = [
        (
            task,
            metric,
            f"{value:.4f}",
            "" if error is None else f"{error:.4f}",
            str(asked[task]["effective"]) if task in asked else "",
        )
        for task, metric, value, error in metrics
    ]
    console.print_table(("TASK", "METRIC", "VALUE", "± ERROR", "ASKED"), cells, right={2, 3, 4})
