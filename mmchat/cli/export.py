"""`mmchat export`: write a model in a form that starts at once."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmchat.cli import console, options
from mmchat.cli.compile_notes import CompileNotes
from mmchat.cli.interrupts import interrupt_says
from mmchat.cli.model_choice import BUILT_IN
from mmchat.cli.option_groups import Without, with_option_groups
from mmchat.cli.units import size
from mmchat.errors import UsageError
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from mmchat.export import ExportReport

EXPORT = "Export"


@with_option_groups
def export(
    format: Annotated[
        Literal["aoti", "executorch", "safetensors"],
        typer.Option(
            "--format",
            help="aoti: compiled programs (.pt2); executorch: for ExecuTorch with XNNPACK (.pte);"
            " safetensors: the weights, ready to be mapped.",
            rich_help_panel=EXPORT,
        ),
    ] = "aoti",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The new folder; else NAME-FORMAT here.",
            rich_help_panel=EXPORT,
        ),
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of aoti and executorch: longest prompt and answer, 64 positions or more; 4096 if"
            " left out, or the model's own. The cache of aoti has this size from the start.",
            rich_help_panel=EXPORT,
        ),
    ] = None,
    max_images: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=16,
            help="Of aoti and executorch: pictures that one question may see.",
            rich_help_panel=EXPORT,
        ),
    ] = 16,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace a folder that something else wrote.",
            rich_help_panel=EXPORT,
        ),
    ] = False,
    *,
    model: Annotated[LoadOptions, Without("max_seq_len", "text_only", "alpha", "compile")],
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Write a model so that it runs without its checkpoint; the folder's path goes to stdout.

    'mmchat generate DIR' and 'mmchat chat DIR' run it. The folder appears when it is whole, and
    was compared with the model. aoti needs a C++ compiler here, but not where the folder runs;
    executorch needs mmchat[executorch], in both places.
    """
    from mmchat.export import ExportPlan, export_model

    folder = (
        (output or Path(f"{Path(model.name or BUILT_IN).name}-{format}")).expanduser().absolute()
    )
    if folder.name in ("", ".", ".."):
        raise UsageError("--output must name a new folder")
    plan = ExportPlan(replace(model, max_seq_len=max_seq_len), folder, format, max_images, force)
    with interrupt_says("stopped; nothing was written"), console.Stages(quiet=quiet) as stages:
        report = export_model(plan, CompileNotes(stages, _shown(stages)).show)
    if not quiet:
        for line in _lines(report):
            console.note(line)
    console.write_safely(f"{folder}\n")


def _shown(stages: console.Stages):
    """Progress as a line: the stage, how far it is, and the time that is left of a long one."""
    begun = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal begun
        if not stage.startswith("compiling"):
            share = f" {100 * done // total} %" if total > 1 else ""
            stages.show(f"{stage}{share}")
            return
        now = time.monotonic()
        begun = now if done == 1 else begun
        left = ""
        if done > 1:
            left = f", about {(now - begun) / (done - 1) * (total - done + 1):.0f} s left"
        stages.show(f"{stage}, program {done} of {total}{left}")

    return show


def _lines(report: ExportReport) -> list[str]:
    lines = [f"{name:<24}{size(number):>12}" for name, number in report.sizes.items()]
    lines.append(f"{'in all':<24}{size(sum(report.sizes.values())):>12}")
    peak = size(report.peak_memory)
    lines.append(f"{report.seconds:.0f} s, peak memory {peak}")
    if report.difference is not None:
        lines.append(f"logits differ from the model's by at most {report.difference:.1g}")
    return lines
