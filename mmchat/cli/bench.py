"""`mmchat bench`: how fast a model reads and writes on this machine, and in how much memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat import words
from mmchat.cli import console, model_choice, options
from mmchat.cli.option_groups import Without
from mmchat.cli.prompt_input import check_output
from mmchat.errors import MmchatError, quoted
from mmchat.loading.options import LoadOptions
from mmchat.quant.schemes import AUTO, find_scheme
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.bench.run import Variant
    from mmchat.catalog.source import ModelSource

of_what = partial(typer.Option, rich_help_panel="What to time")
of_how = partial(typer.Option, rich_help_panel="How often")
COLUMNS = ("TIMED", "MODEL", "MS", "RANGE", "TOKENS/S", "TIMES AS FAST")
# What is compared here, and what follows from the prompts
_FIXED = Without(
    "quantize", "quantize_keep", "max_seq_len", "vision_tower", "text_only", "alpha", "compile"
)


def _listed(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def _list(help: str, check: Callable[[str], object], *, may_be_empty: bool = False) -> Any:
    """An option of several words with commas between them, each of which `check` admits."""

    def each(value: str | None) -> str | None:
        for word in () if value is None else _listed(value) or ([] if may_be_empty else [value]):
            check(word)
        return value

    return of_what(metavar="LIST", callback=each, help=help)


def _counts(most: int) -> Callable[[str], None]:
    def check(word: str) -> None:
        known = word.isascii() and word.isdigit() and len(word) <= len(str(most))
        if not known or not 1 <= int(word) <= most:
            allowed = f"a number from 1 to {most:,}"
            raise typer.BadParameter(f"{word!r} is not {allowed}; a list is written 1,4")

    return check


def _way(word: str) -> None:
    if word not in ("auto", "off", "on"):
        raise typer.BadParameter(f"{word!r} is none of auto, off and on; off,on compares them")


def bench(
    *,
    model: Annotated[LoadOptions, _FIXED],
    quantize: Annotated[
        str, _list("Schemes side by side, such as none,int8,int4; auto: as stored.", find_scheme)
    ] = AUTO,
    compile: Annotated[str, _list("For each scheme auto, off, on, or off,on.", _way)] = "auto",
    context: Annotated[
        str, _list("Read so many tokens and write after them.", _counts(10**6), may_be_empty=True)
    ] = "64,512",
    vision: Annotated[
        str | None,
        _list(
            "Ask about pictures of so many tiles; the least and the most if left out.",
            _counts(10**4),
            may_be_empty=True,
        ),
    ] = None,
    rounds: Annotated[int, of_how(min=1, help="Rounds, interleaved.")] = 5,
    seconds: Annotated[
        float,
        of_how(
            metavar="S",
            min=0,
            max=1e6,
            help="Of each measurement: begin no round beyond this; one is always run.",
        ),
    ] = 60.0,
    as_json: options.Json = False,
    output: options.RecordFile = None,
    quiet: options.Quiet = False,
) -> None:
    """Time a model: reading, pictures, and the tokens it writes after them.

    Try: mmchat bench --quantize none,int8
    """
    check_output(output, "--output", model=model)
    source = model.find()
    model_choice.say_choice(model, source)
    choices = _choices(model, source, _listed(quantize), _listed(compile))
    from mmchat.bench.pictures import fewest_and_most
    from mmchat.bench.run import run
    from mmchat.bench.workloads import Workload

    workloads = [Workload(tokens=int(word)) for word in _listed(context)]
    cells = fewest_and_most(source.spec) if vision is None else map(int, _listed(vision))
    workloads += [Workload(cells=number) for number in cells]
    with console.Stages() as stages:
        loaders = {way: partial(_load, chosen, stages) for way, chosen in choices.items()}
        record = run(loaders, workloads, stages.show, rounds=rounds, seconds=seconds)
    if output is not None:
        atomic_file.write_text(output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if as_json:
        console.print_json(record)
    else:
        show_record(record)


def _load(options: LoadOptions, stages: console.Stages) -> Model:
    return model_choice.load(options, options.find(), stages)


def _choices(
    model: LoadOptions, source: ModelSource, schemes: list[str], ways: list[Any]
) -> dict[Variant, LoadOptions]:
    """Each way of running the model and what loads it; an exported folder beside its model.

    Raises UsageError for a scheme that the folder does not have.
    """
    from mmchat.bench.run import Variant

    folder = source.exported
    if folder is None:
        return {
            Variant(scheme, way): replace(model, quantize=scheme, compile=way)
            for way in ways
            for scheme in schemes
        }
    for scheme in schemes:
        folder.check_scheme(scheme)
    record = folder.record
    original = LoadOptions(
        name=folder.source,
        device=record.device,
        dtype=record.dtype,
        quantize=record.scheme,
        quantize_keep=record.keep,
        kv=model.kv,
        max_seq_len=record.max_seq_len,
        adapter=record.adapters,
        vision_tower=record.companion or None,
    )
    try:
        original.find()
    except MmchatError:
        name = quoted(folder.source)
        console.note(f"{name}, which it was made from, is not here to compare with")
        ways = []
    plain = {Variant(record.scheme, way): replace(original, compile=way) for way in ways}
    return plain | {Variant(record.scheme, exported=True): model}


def show_record(record: dict[str, Any]) -> None:
    """To stdout: a table on a terminal, lines with tabs elsewhere."""
    console.write_safely(console.wrapped(_headline(record)) + "\n")
    console.print_table(COLUMNS, list(_rows(record)), right={2, 3, 4, 5})
    for fact in _facts(record):
        console.write_safely(console.wrapped(fact) + "\n")


def _headline(record: dict[str, Any]) -> str:
    """What was timed, and where."""
    machine = record["environment"]
    where = machine.get("gpu") or f"{machine['cpu']}, {words.plural(machine['threads'], 'thread')}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kept = words.held("none", machine["kv"])
    return f"{record['model']['name']}; {machine['dtype']}{kept} on {where}; {versions}"


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    titles = {"read": "read {}", "token": "a token after {}", "first token": "first token, {}"}
    for entry in record["measured"]:
        title = titles.get(entry["stage"], f"  {entry['stage']}").format(entry["prompt"])
        for name, found in entry["variants"].items():
            ms, speed, ratio = (
                found[key] for key in ("milliseconds", "tokens_per_second", "times_as_fast")
            )
            yield (
                title,
                name,
                number(ms["median"]),
                f"{number(ms['low'])} to {number(ms['high'])}",
                number(speed["median"]) if speed else "",
                f"{ratio['median']:.2f}" if ratio else "",
            )


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _facts(record: dict[str, Any]) -> Iterator[str]:
    """Rounds, loading and memory, a line each."""
    rounds = sorted({entry["rounds"] for entry in record["measured"]})
    if rounds:
        least = f"{rounds[0]} to " if len(rounds) > 1 else ""
        yield f"medians of {least}{words.plural(rounds[-1], 'round')}"
    if record["left_out"]:
        yield f"left out, as the model does not take it: {', '.join(record['left_out'])}"
    loading = (f"{name} in {seconds:.2f} s" for name, seconds in record["load_seconds"].items())
    yield f"loaded: {', '.join(loading)}"
    together = " of all together" if len(record["load_seconds"]) > 1 else ""
    yield f"peak memory{together}: {words.size(record['peak_memory_bytes'])}"
