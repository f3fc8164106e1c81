"""`mmchat eval`: measure a model on questions whose right answers are known."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat import atomic_file
from mmchat.cli import console, options
from mmchat.cli.help_page import App, Group
from mmchat.cli.interrupts import INTERRUPTED_EXIT_CODE
from mmchat.cli.model_choice import ModelChoice, say_choice

if TYPE_CHECKING:
    from mmchat.evals.run import Report

eval_app = App(help="Measure a model's accuracy.", cls=Group)


@eval_app.callback()
def _eval() -> None:
    """Keeps `scenes` a subcommand while it is the only one."""


@eval_app.command()
def scenes(
    model: options.Model = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="How many held-out scenes to ask.",
            rich_help_panel=options.INPUT,
        ),
    ] = 200,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    quantize_keep: options.QuantizeKeep = None,
    checkpoint_path: options.CheckpointPath = None,
    tokenizer_path: options.TokenizerPath = None,
    params_path: options.ParamsPath = None,
    as_json: options.Json = False,
    output: options.OutputFile = None,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Ask about held-out drawn scenes; an answer counts if it is exactly the right one.

    -o FILE writes JSON with every wrong answer. Ctrl-C prints the scores so far.
    """
    if output is not None:
        atomic_file.check_writable(output)
    choice = ModelChoice(
        name=model,
        checkpoint_path=checkpoint_path,
        tokenizer_path=tokenizer_path,
        params_path=params_path,
        device=device,
        dtype=dtype,
        quantize=quantize,
        quantize_keep=quantize_keep,
    )
    source = choice.find()
    if not quiet:
        say_choice(choice, source)
    report, interrupted = _run(choice, limit, quiet)
    record = {"model": source.params.name, "scenes": limit, **_record(report)}
    if output is not None:
        atomic_file.write_text(output, console.to_json(record) + "\n")
    if as_json:
        console.print_json(record)
    else:
        _print_table(report)
    if interrupted:
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _run(choice: ModelChoice, limit: int, quiet: bool) -> tuple[Report, bool]:
    """(the report, whether Ctrl-C cut it short)."""
    from mmchat.evals.run import Tally, judge_scenes
    from mmchat.evals.scenes import heldout_scenes

    with console.Stages(quiet=quiet) as stages:
        model = choice.load(stages)
    tally = Tally()
    try:
        with console.progress_bar("scenes", limit, quiet=quiet) as bar:
            for verdict in judge_scenes(model, heldout_scenes(limit)):
                tally.add(verdict)
                bar.advance()
    except KeyboardInterrupt:
        return tally.report(), True
    return tally.report(), False


def _record(report: Report) -> dict[str, Any]:
    def score(value: Any) -> dict[str, Any]:
        return {**asdict(value), "accuracy": round(value.accuracy, 4)}

    return {
        "overall": score(report.overall),
        "by_type": {name: score(value) for name, value in report.by_type.items()},
        "seconds": round(report.seconds, 3),
        "wrong": [asdict(verdict) for verdict in report.wrong],
    }


def _print_table(report: Report) -> None:
    rows = [(name, score) for name, score in report.by_type.items()]
    rows.append(("all", report.overall))
    cells = [(name, str(s.right), str(s.total), f"{100 * s.accuracy:.1f} %") for name, s in rows]
    if not console.is_terminal(sys.stdout):
        for row in (("TYPE", "RIGHT", "ASKED", "ACCURACY"), *cells):
            console.write_out("\t".join(row) + "\n")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("TYPE")
    for column in ("RIGHT", "ASKED", "ACCURACY"):
        table.add_column(column, justify="right")
    for row in cells[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*cells[-1], style="bold")
    console.stdout_console().print(table)
