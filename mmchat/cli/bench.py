"""`mmchat bench`: how fast a model reads and writes on this machine, and in how much memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.option_groups import Without
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
# What is compared here, and what follows from the prompts
_FIXED = Without(
    "quantize", "quantize_keep", "max_seq_len", "vision_tower", "text_only", "alpha", "compile"
)


def words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def _list(help: str, check: Callable[[str], object], *, may_be_empty: bool = False) -> Any:
    """An option of several words with commas between them, each of which `check` admits."""

    def each(value: str | None) -> str | None:
        for word in () if value is None else words(value) or ([] if may_be_empty else [value]):
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
    rounds: Annotated[int, of_how(metavar="N", min=1, help="Rounds, interleaved.")] = 5,
    seconds: Annotated[
        float,
        of_how(metavar="S", min=0, max=1e6, help="Begin no round beyond this; one is always run."),
    ] = 60.0,
    as_json: options.Json = False,
    output: options.RecordFile = None,
    quiet: options.Quiet = False,
) -> None:
    """Time a model: reading, pictures, and the tokens it writes after them.

    Try: mmchat bench --quantize none,int8
    """
    if output is not None:
        atomic_file.check_writable(output)
    source = model.find()
    if not quiet:
        model_choice.say_choice(model, source)
    choices = _choices(model, source, words(quantize), words(compile), quiet)
    from mmchat.bench.pictures import fewest_and_most
    from mmchat.bench.run import run
    from mmchat.bench.workloads import Workload

    workloads = [Workload(tokens=int(word)) for word in words(context)]
    cells = fewest_and_most(source.spec) if vision is None else map(int, words(vision))
    workloads += [Workload(cells=number) for number in cells]
    with console.Stages(quiet=quiet) as stages:
        loaders = {way: partial(_load, chosen, stages) for way, chosen in choices.items()}
        record = run(loaders, workloads, stages.show, rounds=rounds, seconds=seconds)
    if output is not None:
        atomic_file.write_text(output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if as_json:
        console.print_json(record)
    else:
        from mmchat.cli.bench_table import show_record

        show_record(record)


def _load(options: LoadOptions, stages: console.Stages) -> Model:
    return model_choice.load(options, options.find(), stages)


def _choices(
    model: LoadOptions, source: ModelSource, schemes: list[str], ways: list[Any], quiet: bool
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
        if not quiet:
            name = quoted(folder.source)
            console.note(f"{name}, which it was made from, is not here to compare with")
        ways = []
    plain = {Variant(record.scheme, way): replace(original, compile=way) for way in ways}
    return plain | {Variant(record.scheme, exported=True): model}
