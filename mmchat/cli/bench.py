"""`mmchat bench`: how fast, how much memory, and how that compares, after checking the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, options
from mmchat.cli.bench_exported import ExportedPair, exported_pair, load_variant
from mmchat.cli.bench_options import How, What, words
from mmchat.cli.model_choice import say_choice
from mmchat.cli.option_groups import Only, with_option_groups
from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.bench.plan import Plan, Variant


@with_option_groups
def bench(
    *,
    what: What,
    how: How,
    once: Annotated[str | None, typer.Option(hidden=True)] = None,
    model: Annotated[
        LoadOptions,
        Only("name", "device", "dtype", "checkpoint_path", "tokenizer_path", "params_path"),
    ],
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
    _check(model, what)
    pair = None
    if not what.shapes:
        source = model.find()
        if not quiet and once is None:
            say_choice(model, source)
        pair = exported_pair(model, source, words(what.quantize))
        if pair and pair.notice and not quiet:
            console.note(pair.notice)
    plan = _plan(model, what, how, pair)
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


def _check(model: LoadOptions, what: What) -> None:
    given = model.name or model.checkpoint_path or model.params_path
    if what.shapes and given:
        raise UsageError("--shapes makes a model of random weights; leave MODEL and its paths out")
    needing = {"--vs": what.vs, "--layers": what.layers, "--vision-layers": what.vision_layers}
    for option, value in needing.items():
        if not what.shapes and value is not None:
            raise UsageError(f"{option} needs --shapes, such as --shapes 11B")


def _plan(model: LoadOptions, what: What, how: How, pair: ExportedPair | None) -> Plan:
    from mmchat.bench.plan import PARTS, Plan
    from mmchat.bench.shapes import Shapes

    def numbers(value: str) -> tuple[int, ...]:
        return tuple(map(int, words(value)))

    shapes = None
    if what.shapes:
        shapes = Shapes(what.shapes, what.layers, what.vision_layers, how.seed)
    return Plan(
        shapes=shapes,
        load=pair.load if pair else lambda variant: load_variant(model, variant),
        versus_transformers=what.vs == "transformers",
        variants=pair.variants(words(what.compile)) if pair else _variants(what),
        device=model.device,
        dtype=model.dtype,
        contexts=numbers(what.context),
        prompts=numbers(what.prompt_tokens),
        tiles=numbers(what.vision),
        parts=tuple(part for part in PARTS if part in words(what.measure)),
        rounds=how.rounds,
        seconds=how.seconds,
        threads=how.threads,
        selection=_selection(model, what, how),
    )


def _variants(what: What) -> tuple[Variant, ...]:
    """Every scheme in every way of running it; the plain one is always there, and first."""
    from mmchat.bench.plan import Variant

    asked = [Variant(s, c) for c in words(what.compile) for s in words(what.quantize)]
    return tuple(dict.fromkeys((Variant(), *asked)))


def _selection(model: LoadOptions, what: What, how: How) -> tuple[str, ...]:
    """The arguments with which a new process takes the same model."""
    given: dict[str, object] = {"--device": model.device, "--dtype": model.dtype}
    if what.shapes:
        given |= {
            "--shapes": what.shapes,
            "--layers": what.layers,
            "--vision-layers": what.vision_layers,
            "--seed": how.seed,
            "--vision": what.vision,
            "--threads": how.threads,
        }
    else:
        given |= {
            "--checkpoint-path": model.checkpoint_path,
            "--tokenizer-path": model.tokenizer_path,
            "--params-path": model.params_path,
        }
    found = [
        word for name, value in given.items() if value is not None for word in (name, str(value))
    ]
    return (*([str(model.name)] if model.name else []), *found)


def _indented(record: dict[str, Any]) -> str:
    import json

    return json.dumps(record, indent=1, allow_nan=False) + "\n"
