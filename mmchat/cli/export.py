"""`mmchat export`: write a model in a form that starts at once."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mmchat.cli import console, options
from mmchat.cli.model_choice import BUILT_IN, check_address_space, compile_notes
from mmchat.cli.option_groups import Only
from mmchat.errors import UsageError, disk_errors, quoted
from mmchat.loading.options import PATHS, LoadOptions
from mmchat.words import size

if TYPE_CHECKING:
    from mmchat.export import ExportReport
    from mmchat.export.plan import Format

of_export = partial(typer.Option, rich_help_panel="Export")


# What is counted of stages that take long, by their first word.
COUNTED = {
    "compiling": "program",
    "answering": "sample",
    "encoding": "picture",
    "calibrating": "layer",
}


def complete_format(incomplete: str) -> list[str]:
    """Formats that begin so."""
    from mmchat.export.plan import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


def export(
    format: Annotated[
        str,
        of_export(
            metavar="aoti|executorch|safetensors|hf",
            autocompletion=complete_format,
            help="aoti: compiled programs (.pt2); executorch: for ExecuTorch with XNNPACK (.pte);"
            " safetensors: the weights, ready to be mapped; hf: a checkpoint as on the Hub, from"
            " Meta's files too.",
        ),
    ] = "aoti",
    output: Annotated[
        Path | None,
        of_export("-o", "--output", metavar="DIR", help="The new folder; else NAME-FORMAT here."),
    ] = None,
    keep: Annotated[
        bool,
        of_export(
            help="Of safetensors: into mmchat's cache, where the model and its --quantize find it.",
        ),
    ] = False,
    max_seq_len: Annotated[
        int | None,
        of_export(
            help="Of aoti and executorch: longest prompt and answer, 64 positions or more; 4096 if"
            " left out, or the model's own. The cache of aoti has this size from the start.",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        of_export(
            min=1,
            max=16,
            help="Of aoti and executorch: pictures that one question may see; 16 if left out.",
        ),
    ] = None,
    max_shard_size: Annotated[
        float | None,
        of_export(
            metavar="GB",
            min=0.001,
            max=1e6,
            help="Of hf: largest safetensors file; 5 if left out.",
        ),
    ] = None,
    force: Annotated[
        bool, of_export(help="Replace a folder that something else wrote or changed.")
    ] = False,
    quantize: Annotated[
        str, options.of_scheme(", whatever the model's own are packed in")
    ] = "none",
    quantize_keep: options.QuantizeKeep = None,
    calibrate: Annotated[
        Path | None,
        of_export(
            metavar="FOLDER",
            help="Round to int4 by what the model makes of your own pictures, .txt and .jsonl"
            " there: closer to the model as it was, at the same size.",
        ),
    ] = None,
    *,
    model: Annotated[
        LoadOptions,
        Only(*PATHS, "adapter", "device", "dtype"),
    ],
    quiet: options.Quiet = False,
) -> None:
    """Write a model so that it runs without its checkpoint; the folder's path goes to stdout.

    'mmchat generate DIR' and 'mmchat chat DIR' run it. The folder appears when it is whole, and
    was compared with the model. aoti needs a C++ compiler here, but not where the folder runs;
    executorch needs mmchat[executorch], in both places. hf holds one tensor in memory at a time.
    """
    from mmchat.export import ExportPlan, export_model

    chosen = replace(
        model,
        quantize=quantize,
        quantize_keep=quantize_keep or (),
        max_seq_len=max_seq_len,
    )
    if keep:
        if format != "safetensors" or output is not None or quantize == "none":
            raise UsageError("--keep is for --format safetensors --quantize SCHEME, without -o")
        folder = _place_to_keep(chosen, calibrate)
    else:
        named = model.name or model.checkpoint_path or BUILT_IN
        folder = output or Path(f"{Path(named).expanduser().absolute().name}-{format}")
    if folder == Path("-"):
        raise UsageError("--output '-' is no folder: stdout is not possible here; name a new one")
    folder = folder.expanduser().absolute()
    if folder.name in ("", ".", ".."):
        raise UsageError("--output must name a new folder")
    plan = ExportPlan(
        chosen,
        folder,
        cast("Format", format),
        max_images=max_images,
        max_shard_bytes=int(max_shard_size * 1e9) if max_shard_size else None,
        force=force,
        calibrate=calibrate,
    )
    check_address_space()
    with (
        console.interrupt_says("stopped; nothing was written"),
        console.Stages() as stages,
    ):
        report = export_model(plan, compile_notes(stages, _shown(stages)))
    console.note(*_lines(report))
    if keep:
        used = f"the model is read from there where --quantize {quantize} is given"
        console.note(f"{used}; 'mmchat remove {folder.name}' removes it")
    console.print_path(folder)


def _place_to_keep(model: LoadOptions, calibrate: Path | None) -> Path:
    """A folder in the one for exports that are kept, which is made. Raises DiskError, …"""
    from mmchat.catalog.kept import place_for

    folder = place_for(model.find(), model.quantize, model.plan.keep, calibrate)
    place = folder.parent
    advice = "give -o DIR in its place, and DIR as the model"
    with disk_errors(f"--keep cannot write to {quoted(place, 300)}", advice):
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    return folder


def _shown(stages: console.Stages):
    """Progress as a line: the stage, how far it is, and the time that is left of a long one."""
    begun = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal begun
        unit = COUNTED.get(stage.split()[0])
        if unit is None:
            share = f" {100 * done // total} %" if total > 1 else ""
            stages.show(f"{stage}{share}")
            return
        now = time.monotonic()
        begun = now if done == 1 else begun
        left = ""
        if done > 1:
            left = f", about {(now - begun) / (done - 1) * (total - done + 1):.0f} s left"
        stages.show(f"{stage}, {unit} {done} of {total}{left}")

    return show


def _lines(report: ExportReport) -> list[str]:
    rows = report.sizes | {"in all": sum(report.sizes.values())}
    width = max(24, *(len(name) + 2 for name in rows))
    lines = [f"{name:<{width}}{size(number):>12}" for name, number in rows.items()]
    if report.dtype is not None:
        lines.append(f"in {report.dtype} (see --dtype)")
    lines += report.remarks
    peak = size(report.peak_memory)
    lines.append(f"{report.seconds:.0f} s, peak memory {peak}")
    if report.difference is not None:
        lines.append(f"logits differ from the model's by at most {report.difference:.1g}")
    return lines
