"""`mmchat batch`: rows in, a line of JSON each out; the same command again goes on."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.prompt_input import check_model, keep_own_files, refuse_overwriting
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.errors import INTERRUPTED_EXIT_CODE, UsageError, quoted
from mmchat.input_text import checked
from mmchat.loading.options import LoadOptions
from mmchat.words import USUAL_QUESTION, plural

if TYPE_CHECKING:
    from mmchat.batch.cluster import Job
    from mmchat.batch.output import Output
    from mmchat.batch.rows import Asked, Row
    from mmchat.batch.run import Line
    from mmchat.catalog.source import ModelSource

FAILED_EXIT_CODE = 8
LOG_SECONDS = 60.0  # between two lines of progress where there is no bar


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="A folder, a glob, pictures; a JSONL, in OpenAI's batch form or with image and"
            " prompt in each line; or a CSV with a column image.",
        ),
    ],
    output: Annotated[Path, options.to_file("OUT.jsonl", "Where answers go.")],
    prompt: Annotated[
        str | None,
        options.of_input("-p", "--prompt", metavar="TEXT", help="For rows without their own."),
    ] = None,
    system: options.System = None,
    shard: Annotated[
        str | None,
        options.of_input(metavar="I/N", help="Only part I of N, from 0 on; each has its own -o."),
    ] = None,
    ray: Annotated[
        str | None,
        options.of_model(
            "--ray", metavar="ADDRESS", help="Answer on a running Ray cluster: HOST:PORT or auto."
        ),
    ] = None,
    rows: options.Rows = None,
    max_errors: Annotated[
        int | None,
        options.of_output(min=0, help="End the job when more than N rows failed."),
    ] = None,
    force: Annotated[bool, options.of_output(help="Begin OUT.jsonl anew.")] = False,
    check: Annotated[
        bool, options.of_output(help="Count what is done and missing, and no more.")
    ] = False,
    *,
    sampling: SamplingOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask about very many pictures; each answer is a line of JSON, and a rerun goes on.

    A picture that cannot be read is a line with its error. Exit code 0 says that every row has an
    answer, 8 that some have not.
    """
    from mmchat.batch import cluster
    from mmchat.batch.output import Output
    from mmchat.batch.rows import read_rows

    if ray is not None:
        cluster.check_address(ray, model.ranks)
    part = _shard(shard)
    question = USUAL_QUESTION if prompt is None else checked(prompt, "--prompt")
    if not question.strip():
        raise UsageError("the prompt is empty; give a question with --prompt TEXT")
    refuse_overwriting(output, inputs, "-o", "the input")
    keep_own_files(output, "-o", model, sampling.schema)

    def keep(row: Asked) -> None:
        refuse_overwriting(output, row.sources, "-o", "a picture of the input")

    every = read_rows(inputs, keep)
    asked = [row for row in every if row.is_in(part)]
    source = model.find() if check else model_choice.find_or_offer(model)
    has_pictures = any(row.asked and row.asked.images for row in asked)
    check_model(source.spec, has_pictures=has_pictures, system=system)
    if not check:
        model_choice.say_choice(model, source)
        if prompt is None and any(row.asked and not row.asked.prompt for row in asked):
            console.note(f'no question is given; asking "{question}"')
    run = _run_name(source, model, sampling, question, system)
    code = FAILED_EXIT_CODE
    with Output(output, run, force=force and not check, read_only=check) as out:
        from mmchat.batch.run import Defaults, still_to_do

        before = {**out.answered, **out.failed}
        todo = still_to_do(asked, before)
        again = {row.custom_id for row in todo}
        if todo and not check:
            defaults = Defaults(question, system, sampling.for_model(source.spec))
            lines = _answered(ray, cluster.Job(model, source, defaults, rows), todo)
            if _write(out, lines, [row.custom_id for row in todo], max_errors):
                code = INTERRUPTED_EXIT_CODE
        now = {**out.answered, **out.failed}
        # without a line, or with that of what was asked before
        missing = {
            name
            for name in again
            if name not in now or (now[name] and now[name] == before.get(name))
        }
        kept = out.failed.keys() - missing
        others = len(now.keys() - {row.custom_id for row in every})
        failed = [row.custom_id for row in asked if row.custom_id in kept]
    done = len(asked) - len(failed) - len(missing)
    counts = {"rows": len(asked), "answered": done, "failed": len(failed), "missing": len(missing)}
    if left := [quoted(name) for name in failed if name not in again]:
        shown = console.FAILURES_SHOWN
        more = f" and {len(left) - shown:,} more" if len(left) > shown else ""
        console.note(f"failed before, not asked again: {', '.join(left[:shown])}{more}")
    if others:
        lines = plural(others, "line")
        console.note(f"{quoted(output)} has {lines} of rows that are not asked any more; they stay")
    if as_json:
        console.print_json(counts)
    elif check:
        console.print_facts([(name, f"{count:,}") for name, count in counts.items()])
    else:
        told = (f"{count:,} {name}" for name, count in counts.items() if name != "rows")
        console.note(", ".join((plural(len(asked), "row"), *told)))
    if failed or missing:
        raise typer.Exit(code)


def _answered(ray: str | None, job: Job, todo: Sequence[Row]) -> Iterator[Line]:
    """The lines of a cluster, or of the model that is loaded here."""
    from mmchat.batch import cluster
    from mmchat.batch.run import answer_lines

    if ray is not None:
        return cluster.answer_lines(ray, todo, job)
    with console.Stages() as stages:
        loaded = model_choice.load(job.options, job.source, stages)
    return answer_lines(loaded, todo, job.defaults, job.rows)


def _write(out: Output, lines: Iterator[Line], todo: Sequence[str], max_errors: int | None) -> bool:
    """Write what is answered of the rows `todo`; whether Ctrl-C came."""
    errors: list[str] = []
    ended = ""
    count = len(todo)
    began = said = time.monotonic()
    try:
        with console.progress_bar("rows", count) as advance:
            for done, line in enumerate(lines, start=1):
                if done == 1:  # a job that is refused leaves the file as it was
                    out.forget(todo)
                out.add(line)
                if line["error"] is not None:
                    name, text = quoted(line["custom_id"]), line["error"]["message"]
                    errors.append(text if name in text else f"{name}: {text}")
                now = time.monotonic()
                rate = done / max(now - began, 1e-3) * 60
                details = f"{rate:,.1f} a minute, {len(errors):,} failed"
                advance(details)
                if now - said > LOG_SECONDS and not console.is_terminal(sys.stderr):
                    said, left = now, (count - done) / rate
                    console.note(f"{done:,} of {count:,}, {details}, {left:,.0f} min left")
                if max_errors is not None and len(errors) > max_errors:
                    ended = f"ended: more than --max-errors {max_errors:,} rows failed"
                    break
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on from here")
        return True
    finally:
        lines.close()  # type: ignore[attr-defined] - of generators
        console.note_failures(errors)
        if ended:
            console.note(ended)
    return False


def _shard(text: str | None) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", "0/1" if text is None else text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if number >= count:
        raise UsageError(f"--shard {quoted(text)} is none; write I/N with I from 0 to N - 1")
    return number, count


def _run_name(
    source: ModelSource, model: LoadOptions, sampling: SamplingOptions, *asked: str | None
) -> str:
    """Stands for all that changes answers; the same on every machine that has the same model."""
    chosen = {**sampling.chosen(), "speculate": None}  # which changes no answer
    said = [*model.identity(source), chosen, asked]
    return sha256(json.dumps(said).encode()).hexdigest()[:16]
