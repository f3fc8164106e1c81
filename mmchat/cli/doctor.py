"""`mmchat doctor`: what this machine can run, how fast, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from mmchat.cli import console, options
from mmchat.cli.model_choice import compile_notes
from mmchat.errors import UsageError
from mmchat.words import pace, plural, size

if TYPE_CHECKING:
    from mmchat.doctor import Diagnosis
    from mmchat.doctor.machine import Machine
    from mmchat.doctor.outlook import Outlook

HEADER = ("MODEL", "SCHEME", "NEEDS", "FITS", "TOK/S", "PICTURE")
SHARED_HEADER = ("MODEL", "SCHEME", "EACH NEEDS", "FITS")
FITS = {True: "✔ yes", False: "✘ no", None: "?"}


def doctor(
    parallel: Annotated[
        int,
        options.of_model(min=1, help="Also what each of N processes needs that share a model."),
    ] = 1,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what this machine can run and how fast, and what is missing.

    Measures the memory for a few seconds. Speeds are estimates: how fast the weights that a token
    needs are read.
    """
    with console.Stages() as stages:
        stages.show("importing torch")
        from mmchat.doctor import diagnose
        from mmchat.quant.kernels import native

        native.prepare(compile_notes(stages))
        diagnosis = diagnose(stages.show, parallel)
    if parallel > 1 and not diagnosis.shared:
        raise UsageError(f"--parallel {parallel}: no known model can be shared so; use 2, 4 or 8")
    if as_json:
        console.print_json(diagnosis.as_dict())
    else:
        _show(diagnosis, parallel)


def _show(diagnosis: Diagnosis, ranks: int) -> None:
    verdict, machine = diagnosis.verdict, diagnosis.machine
    console.write_out(console.wrapped(verdict.text) + "\n")
    for number, command in enumerate(verdict.commands):
        console.write_safely(f"  {'then ' if number else ''}{command}\n")
    console.write_out("\n")
    console.print_facts(list(_facts(machine)))
    models = console.table_rows(HEADER, [*_rows(_distinct(diagnosis.outlooks))], right={2, 4, 5})
    console.write_out("\n".join(["", *models, console.wrapped(_legend(machine)), ""]))
    if diagnosis.shared:
        rows = [row[:4] for row in _rows(_distinct(diagnosis.shared))]
        shared = console.table_rows(SHARED_HEADER, rows, right={2})
        of_memory = "an equal part of the memory" if machine.device.name == "cpu" else "a card each"
        legend = f"For each of {ranks} ranks (--parallel {ranks}), which have {of_memory}."
        console.write_out("\n".join(["", *shared, console.wrapped(legend), ""]))
    for found in diagnosis.problems:
        problem = console.wrapped(f"! {found.problem}", "  ")
        console.write_safely(f"\n{problem}\n{console.wrapped(f'  {found.remedy}', '  ')}\n")


def _facts(machine: Machine) -> Iterator[tuple[str, str]]:
    for number, device in enumerate(machine.devices):
        free = "memory unknown"
        if device.available is not None and device.total is not None:
            free = f"{size(device.available)} of {size(device.total)} free"
        if machine.limited_by and device.name == "cpu":
            free += f", limited by {machine.limited_by}"
        yield "" if number else "device", f"{device.name}: {device.model}; {free}"
    cores, threads = plural(machine.cores, "core"), plural(machine.threads, "thread")
    yield "processor", f"{cores}, {threads}"
    yield "reading", _reading(machine)
    for number, choice in enumerate(machine.kernels):
        yield "" if number else "kernels", f"{choice.serves}: {choice.kernel} ({choice.reason})"
    versions = (f"{name} {version}" for name, version in machine.versions.items() if version)
    yield "versions", ", ".join(versions)


def _reading(machine: Machine) -> str:
    if machine.reading is None:
        return f"not measured: {machine.unmeasured}"
    speeds = {machine.dtype if n == "none" else n: s for n, s in machine.reading.linears.items()}
    return f"weights in {', '.join(f'{n} {s / 1e9:.1f}' for n, s in speeds.items())} GB/s"


def _distinct(outlooks: Sequence[Outlook]) -> list[Outlook]:
    """One model of each size, to two digits: base and guard models need what the others need."""
    chosen: dict[tuple[str, str], Outlook] = {}
    for outlook in outlooks:
        key = (f"{outlook.spec.parameters:.1e}", outlook.scheme)
        if key not in chosen or outlook.is_chat:
            chosen[key] = outlook
    return list(chosen.values())


def _rows(outlooks: Sequence[Outlook]) -> Iterator[tuple[str, ...]]:
    for outlook in outlooks:
        speeds = map(pace, outlook.speeds) if outlook.speeds else ("-", "-")
        needs = size(outlook.need.total)
        yield (outlook.short, outlook.scheme, needs, FITS[outlook.fits], *speeds)


def _legend(machine: Machine) -> str:
    from mmchat.estimate.memory import USUAL_POSITIONS

    where = "on the processor" if machine.device.name == "cpu" else f"on {machine.device.name}"
    return (
        f"In {machine.dtype} {where}, with room for {USUAL_POSITIONS:,} tokens and a picture of 4"
        " tiles; TOK/S: tokens a second, PICTURE: after one. Base and guard models need as much."
    )
