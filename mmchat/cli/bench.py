"""`mmchat bench`: how fast a model reads and writes on this machine, and in how much memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, options
from mmchat.cli.model_choice import ModelChoice, say_choice
from mmchat.cli.sampling_options import number
from mmchat.errors import MmchatError, quoted
from mmchat.quant.schemes import find_scheme
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.bench.variants import Variant
    from mmchat.catalog.find import ModelSource

WHAT = "What to time"
HOW = "How often"


def words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def _list(help: str, check: Callable[[str], object], *, may_be_empty: bool = False) -> Any:
    """An option of several words with commas between them, each of which `check` admits."""

    def each(value: str) -> str:
        for word in words(value) or ([] if may_be_empty else [value]):
            check(word)
        return value

    return typer.Option(metavar="LIST", callback=each, help=help, rich_help_panel=WHAT)


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
    model: options.Model = None,
    quantize: Annotated[
        str, _list("Schemes side by side, such as none,int8,int4.", find_scheme)
    ] = "none",
    compile: Annotated[str, _list("For each scheme auto, off, on, or off,on.", _way)] = "auto",
    context: Annotated[
        str, _list("Read so many tokens and write after them.", _counts(10**6), may_be_empty=True)
    ] = "64,512",
    vision: Annotated[
        str, _list("Ask about pictures of 1 to 4 tiles.", _counts(4), may_be_empty=True)
    ] = "1,4",
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rounds, interleaved.", rich_help_panel=HOW)
    ] = 5,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            callback=number(0, 1e6),
            help="Begin no round beyond this; one is always run.",
            rich_help_panel=HOW,
        ),
    ] = 60.0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    checkpoint_path: options.CheckpointPath = None,
    tokenizer_path: options.TokenizerPath = None,
    params_path: options.ParamsPath = None,
    as_json: options.Json = False,
    output: options.OutputFile = None,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Time a model: reading, pictures, and the tokens it writes after them.

    Try: mmchat bench --quantize none,int8. -o FILE writes JSON as well.
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
    )
    source = choice.find()
    if not quiet:
        say_choice(choice, source)
    choices = _choices(choice, source, words(quantize), words(compile), quiet)
    from mmchat.bench.run import run
    from mmchat.bench.workloads import Workload

    workloads = [Workload(tokens=int(word)) for word in words(context)]
    workloads += [Workload(tiles=int(word)) for word in words(vision)]
    with console.Stages(quiet=quiet) as stages:
        loaders = {way: partial(chosen.load, stages) for way, chosen in choices.items()}
        record = run(loaders, workloads, stages.show, rounds=rounds, seconds=seconds)
    if output is not None:
        atomic_file.write_text(output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if as_json:
        console.print_json(record)
    else:
        from mmchat.cli.bench_table import show_record

        show_record(record)


def _choices(
    choice: ModelChoice, source: ModelSource, schemes: list[str], ways: list[Any], quiet: bool
) -> dict[Variant, ModelChoice]:
    """Each way of running the model and what loads it; an exported folder beside its model.

    Raises UsageError for a scheme that the folder does not have.
    """
    from mmchat.bench.variants import Variant
    from mmchat.runtime.exported import exported_folder

    folder = exported_folder(source.checkpoint)
    if folder is None:
        return {
            Variant(scheme, way): replace(choice, quantize=scheme, compile=way)
            for way in ways
            for scheme in schemes
        }
    for scheme in schemes:
        folder.check_options(scheme, ())
    record = folder.record
    dtype: Any = record.dtype  # one of those that the option has
    original = ModelChoice(
        name=folder.source,
        device=record.device,
        dtype=dtype,
        quantize=record.scheme,
        quantize_keep=list(record.keep),
        max_seq_len=record.max_seq_len,
    )
    try:
        original.find()
    except MmchatError:
        if not quiet:
            name = quoted(folder.source)
            console.note(f"{name}, which it was made from, is not here to compare with")
        ways = []
    plain = {Variant(record.scheme, way): replace(original, compile=way) for way in ways}
    return plain | {Variant(record.scheme, exported=True): choice}
