"""`mmchat bench`: how fast, how much memory, and how that compares, after checking the answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat import atomic_file
from mmchat.cli import console, options
from mmchat.cli.model_choice import ModelChoice, check_name, say_choice
from mmchat.errors import UsageError

if TYPE_CHECKING:
    from mmchat.bench.plan import Plan

WHAT = "What to measure"
HOW = "How"
ALL_PARTS = "decode,prefill,picture,turns,bandwidth,memory,startup"


def _numbers(low: int) -> Callable[[str], str]:
    """A callback that checks a list such as 64,1024; it may be empty."""

    def check(value: str) -> str:
        if any(
            not word.isascii() or not word.isdigit() or int(word) < low for word in _words(value)
        ):
            raise typer.BadParameter(f"{value!r} is not a list of numbers from {low}, such as 1,4")
        return value

    return check


def _known_parts(value: str) -> str:
    for word in _words(value):
        if word not in ALL_PARTS.split(","):
            raise typer.BadParameter(f"{word!r} is none of {ALL_PARTS}")
    return value


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def bench(
    model: options.Model = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="11B|90B",
            help="Random weights of these widths in place of MODEL.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --shapes: text layers.", rich_help_panel=WHAT),
    ] = None,
    vision_layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --shapes: vision layers.", rich_help_panel=WHAT),
    ] = None,
    vs: Annotated[
        Literal["transformers"] | None,
        typer.Option(
            "--vs", help="With --shapes: the same weights in transformers.", rich_help_panel=WHAT
        ),
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Schemes to compare, such as none,int8,int4.",
            rich_help_panel=WHAT,
        ),
    ] = "none",
    measure: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_known_parts,
            help=f"Any of {ALL_PARTS}.",
            rich_help_panel=WHAT,
        ),
    ] = "decode,prefill,picture,turns,bandwidth",
    context: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_numbers(1),
            help="Decode after so many tokens.",
            rich_help_panel=WHAT,
        ),
    ] = "64,1024,4096",
    prompt_tokens: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_numbers(1),
            help="Read prompts of so many tokens.",
            rich_help_panel=WHAT,
        ),
    ] = "64,512",
    vision: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=_numbers(1),
            help="Pictures of so many tiles; '' for none.",
            rich_help_panel=WHAT,
        ),
    ] = "1,4",
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rounds, interleaved.", rich_help_panel=HOW)
    ] = 5,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            callback=options.number(0, 1e6),
            help="Begin no round beyond this; one is always run.",
            rich_help_panel=HOW,
        ),
    ] = 60.0,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Processor threads; with 1, processor time is compared, not the wall clock's.",
            rich_help_panel=HOW,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the random weights.", rich_help_panel=HOW)
    ] = 0,
    once: Annotated[str | None, typer.Option(hidden=True)] = None,
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
    """Measure speed and memory, side by side, after checking that all say the same.

    Try: mmchat bench --shapes 11B --vs transformers. -o FILE writes JSON as well.
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
    _check(choice, shapes, layers, vision_layers, vs)
    if not shapes:
        source = choice.find()
        if not quiet and once is None:
            say_choice(choice, source)
    plan = _plan(
        choice, shapes, layers, vision_layers, vs, seed, quantize, measure, context, prompt_tokens,
        vision, rounds, seconds, threads,
    )  # fmt: skip
    if once is not None:
        from mmchat.bench.processes import once as measure_once

        console.print_json(measure_once(plan, once))
        return
    from mmchat.bench.run import run

    with console.Stages(quiet=quiet) as stages:
        record = run(plan, stages.show)
    if output is not None:
        atomic_file.write_text(output, _indented(record))
    if as_json:
        console.print_json(record)
    else:
        from mmchat.cli.bench_table import show_record

        show_record(record)


def _check(
    choice: ModelChoice, shapes: str | None, layers: int | None, vision: int | None, vs: str | None
) -> None:
    given = choice.name or choice.checkpoint_path or choice.params_path
    if shapes and given:
        raise UsageError("--shapes makes a model of random weights; leave MODEL and its paths out")
    if not shapes and (vs or layers is not None or vision is not None):
        option = "--vs" if vs else "--layers" if layers is not None else "--vision-layers"
        raise UsageError(f"{option} needs --shapes, such as --shapes 11B")
    if not shapes:
        check_name(choice.name)


def _plan(
    choice: ModelChoice, shapes: str | None, layers: int | None, vision_layers: int | None,
    vs: str | None, seed: int, quantize: str, measure: str, context: str, prompt_tokens: str,
    vision: str, rounds: int, seconds: float, threads: int | None,
) -> Plan:  # fmt: skip
    from mmchat.bench.plan import PARTS, Plan
    from mmchat.bench.shapes import Shapes

    def numbers(value: str) -> tuple[int, ...]:
        return tuple(map(int, _words(value)))

    made = Shapes(shapes, layers, vision_layers, seed) if shapes else None
    wanted = _words(measure)
    return Plan(
        shapes=made,
        load=lambda scheme: _load(choice, scheme),
        versus_transformers=vs == "transformers",
        schemes=tuple(_words(quantize)),
        device=choice.device,
        dtype=choice.dtype,
        contexts=numbers(context),
        prompts=numbers(prompt_tokens),
        tiles=numbers(vision),
        parts=tuple(part for part in PARTS if part in wanted),
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        selection=_selection(choice, made, vision, threads),
    )


def _load(choice: ModelChoice, scheme: str) -> Any:
    with console.Stages(quiet=True) as stages:
        return choice.load(stages)


def _selection(
    choice: ModelChoice, shapes: Any, vision: str, threads: int | None
) -> tuple[str, ...]:
    """The arguments with which a new process takes the same model."""
    found = ["--device", choice.device, "--dtype", choice.dtype]
    if shapes:
        found += ["--shapes", shapes.name, "--seed", str(shapes.seed), "--vision", vision]
        pairs = (("--layers", shapes.layers), ("--vision-layers", shapes.vision_layers))
        found += [word for name, n in pairs if n is not None for word in (name, str(n))]
        return (*found, *(("--threads", str(threads)) if threads else ()))
    paths: tuple[tuple[str, Path | None], ...] = (
        ("--checkpoint-path", choice.checkpoint_path),
        ("--tokenizer-path", choice.tokenizer_path),
        ("--params-path", choice.params_path),
    )
    found += [word for name, path in paths if path for word in (name, str(path))]
    return (*([choice.name] if choice.name else []), *found)


def _indented(record: dict[str, Any]) -> str:
    import json

    return json.dumps(record, indent=1, allow_nan=False) + "\n"
