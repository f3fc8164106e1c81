"""`mmchat eval`: measure a model on questions whose right answers are known."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.eval_tasks import tasks
from mmchat.cli.help_page import Command, Group, plain_app
from mmchat.cli.option_groups import Without, with_option_groups
from mmchat.cli.prompt_input import check_output, refuse_one_file
from mmchat.errors import INTERRUPTED_EXIT_CODE
from mmchat.limits import MOST_ROWS
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.evals.run import By, Report, Score
    from mmchat.evals.scenes.phrasings import Wording

TASK = "TASK"  # stands on the help page for any name of a task


class EvalGroup(Group):
    """Takes what is no command for the tasks of lm_eval."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        is_task = args[0] not in self.commands and not args[0].startswith("-")
        return super().resolve_command(ctx, [TASK, *args] if is_task else args)


eval_app = plain_app(cls=EvalGroup, help="Measure a model's accuracy.")
eval_app.command(TASK, cls=Command, short_help="Run benchmarks of lm_eval: mmmu_val, chartqa.")(
    with_option_groups(tasks)
)


@eval_app.command(cls=Command, short_help="Ask about held-out drawn scenes.")
@with_option_groups
def scenes(
    limit: Annotated[int, options.of_input(min=1, help="How many held-out scenes to ask.")] = 200,
    by: Annotated[
        Literal["type", "canvas", "tiles", "objects"],
        options.of_output(
            help="What each line of the table is about: the type of question, the canvas, how many"
            " tiles, or how many objects the picture has."
        ),
    ] = "type",
    wording: Annotated[
        Literal["plain", "unseen"],
        options.of_input(
            help="Ask in plain sentences, or in words that the built-in model never saw."
        ),
    ] = "plain",
    rows: Annotated[
        int,
        options.of_input(min=1, max=MOST_ROWS, help="How many scenes to ask at once."),
    ] = 1,
    wrong: Annotated[
        Path | None,
        options.of_output(
            metavar="FILE", help="Write an HTML page of the wrong answers with their pictures."
        ),
    ] = None,
    *,
    model: Annotated[LoadOptions, Without("max_seq_len", "text_only", "alpha", "compile")],
    as_json: options.Json = False,
    output: options.RecordFile = None,
    quiet: options.Quiet = False,
) -> None:
    """Ask about held-out drawn scenes; an answer counts if it is exactly the right one.

    The interval holds, with 95 % confidence, the accuracy on all questions of the kind. JSON
    has every wrong answer. Ctrl-C prints the scores so far.
    """
    for option, path in (("--output", output), ("--wrong", wrong)):
        check_output(path, option, model=model)
    refuse_one_file("--output", output, "--wrong", wrong)
    source = model.find()
    loaded = model_choice.load_with_notes(model, source)
    if rows > loaded.most_rows:
        console.note(f"exported programs read one conversation at a time, not {rows}")
    report, interrupted = _run(loaded, limit, wording, rows, by)
    name = source.spec.name
    record = {"model": name, "scenes": limit, "wording": wording, **_record(report, by)}
    if output is not None:
        atomic_file.write_text(output, console.to_json(record) + "\n")
    if wrong is not None:
        from mmchat.evals.run import wrong_answers

        atomic_file.write_text(wrong, wrong_answers(name, report.wrong, report.overall.total))
    if as_json:
        console.print_json(record)
    else:
        _print_table(report, by)
    if interrupted:
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _run(model: Model, limit: int, wording: Wording, rows: int, by: By) -> tuple[Report, bool]:
    """(the scores, whether Ctrl-C cut them short)."""
    from mmchat.evals.run import judge_scenes, report
    from mmchat.evals.scenes import heldout_scenes

    verdicts, interrupted, began = [], False, time.perf_counter()
    try:
        with console.progress_bar("scenes", limit) as advance:
            for verdict in judge_scenes(model, heldout_scenes(limit, wording=wording), rows):
                verdicts.append(verdict)
                advance()
    except KeyboardInterrupt:
        interrupted = True
    return report(verdicts, time.perf_counter() - began, by), interrupted


def _record(report: Report, by: str) -> dict[str, Any]:
    def score(value: Score) -> dict[str, Any]:
        interval = [round(end, 4) for end in value.interval]
        return {**asdict(value), "accuracy": round(value.accuracy, 4), "interval": interval}

    return {
        "overall": score(report.overall),
        f"by_{by}": {name: score(value) for name, value in report.parts.items()},
        "seconds": round(report.seconds, 3),
        "wrong": [
            {
                "seed": verdict.scene.seed,
                "type": verdict.question.type,
                "canvas": verdict.group("canvas"),
                "question": [each.text for each in (*verdict.question.earlier, verdict.question)],
                "expected": verdict.question.answer,
                "answer": verdict.answer,
            }
            for verdict in report.wrong
        ],
    }


def _print_table(report: Report, by: str) -> None:
    cells = [
        (
            name,
            str(score.right),
            str(score.total),
            f"{100 * score.accuracy:.1f} %",
            "{:.1f} to {:.1f} %".format(*(100 * end for end in score.interval)),
        )
        for name, score in (*report.parts.items(), ("all", report.overall))
    ]
    heads = (by.upper(), "RIGHT", "ASKED", "ACCURACY", "INTERVAL")
    console.print_table(heads, cells, right={1, 2, 3, 4})
