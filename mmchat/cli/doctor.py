"""`mmchat doctor`: what this machine can run, how fast, and what stands in the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.cli import console, options
from mmchat.cli.compile_notes import CompileNotes
from mmchat.cli.units import plural, size
from mmchat.terminal import sanitize

if TYPE_CHECKING:
    from rich.table import Table

    from mmchat.doctor import Diagnosis
    from mmchat.doctor.machine import Device, Machine
    from mmchat.doctor.outlook import Outlook
    from mmchat.doctor.verdict import Verdict

WIDE = 100  # columns from which the table shows the parts of the memory


def doctor(
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Show what this machine can run and how fast, and what is missing.

    Measures the memory for a few seconds. Speeds are estimates: how fast the weights that a token
    needs are read.
    """
    with console.Stages(quiet=quiet) as stages:
        stages.show("importing torch")
        from mmchat.doctor import diagnose
        from mmchat.quant.kernels import native

        native.prepare(CompileNotes(stages).show)
        diagnosis = diagnose(stages.show)
    if as_json:
        console.print_json(diagnosis.as_dict())
        return
    _show(diagnosis)


def _show(diagnosis: Diagnosis) -> None:
    from rich.text import Text

    out = console.stdout_console()
    _print_verdict(diagnosis.verdict)
    facts = list(_fact_lines(diagnosis.machine))
    if console.is_terminal(sys.stdout):
        out.print(_table(facts))
    else:
        console.print_facts(facts)
    out.print()
    out.print(_models(_distinct(diagnosis.outlooks), wide=out.width >= WIDE))
    out.print(Text(_legend(diagnosis.machine), style="dim"))
    for found in diagnosis.problems:
        out.print(Text.assemble("\n", ("! ", "bold yellow"), sanitize(found.problem)))
        out.print(Text(f"  {sanitize(found.remedy)}"))


def _print_verdict(verdict: Verdict) -> None:
    from rich.text import Text

    out = console.stdout_console()
    style = "bold green" if verdict.model else "bold yellow"
    out.print(Text(verdict.text, style=style))
    for number, command in enumerate(verdict.commands):
        out.print(Text.assemble("  then " if number else "  ", (command, "bold")))
    out.print()


def _table(facts: list[tuple[str, str]]) -> Table:
    """Labels and what is known, wrapped to the width of the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for label, value in facts:
        table.add_row(label, Text(sanitize(value)))
    return table


def _fact_lines(machine: Machine) -> Iterator[tuple[str, str]]:
    from mmchat.doctor.machine import EXTRAS

    for device in machine.devices:
        yield "device" if device is machine.device else "", _device(device)
    cpu, threads = machine.cpu, plural(machine.threads, "thread")
    isa = ", ".join(cpu.isa) or "instruction sets unknown"
    cache = f"; cache {size(cpu.llc_bytes)}" if cpu.llc_bytes else ""
    yield "processor", f"{plural(machine.cores, 'core')}, {threads}; {isa}{cache}"
    yield "memory", _memory(machine)
    yield "reading", _reading(machine)
    for number, choice in enumerate(machine.kernels):
        yield "" if number else "kernels", f"{choice.serves}: {choice.kernel} ({choice.reason})"
    compilers = ", ".join(f"{c.name} {c.version or '(does not run)'}" for c in machine.compilers)
    yield "compilers", compilers or "none found"
    for number, cache in enumerate(machine.caches):
        free = f", {size(cache.free)} free there" if cache.free is not None else ""
        place = cache.path.replace(str(Path.home()), "~", 1)
        yield "" if number else "caches", f"{cache.name}: {size(cache.bytes)} in {place}{free}"
    known = {name: version for name, version in machine.versions.items() if version}
    yield "versions", ", ".join(f"{name} {version}" for name, version in known.items())
    yield "extras", ", ".join(n for n, present in machine.extras.items() if present) or "none"
    for name, present in machine.extras.items():
        if not present:
            yield "", f"missing {name}: {EXTRAS[name][0]}; pip install 'mmchat[{name}]'"


def _device(device: Device) -> str:
    free = "memory unknown"
    if device.available is not None and device.total is not None:
        free = f"{size(device.available)} of {size(device.total)} free"
    fast = ", ".join(device.fast_dtypes)
    rates = ", ".join(f"{name} {rate / 1e12:.2g}" for name, rate in device.products.items())
    return f"{device.name}: {device.model}; {free}; fast in {fast} (TFLOP/s: {rates})"


def _memory(machine: Machine) -> str:
    host = machine.host
    if host is None:
        return "unknown"
    limit = f"; limited by {host.limited_by}" if host.limited_by else "; no container limit"
    return f"{size(host.available)} of {size(host.total)} free{limit}"


def _reading(machine: Machine) -> str:
    if machine.reading is None:
        return "not measured: too little memory is free"
    speeds = {machine.dtype if n == "none" else n: s for n, s in machine.reading.linears.items()}
    formats = ", ".join(f"{name} {speed / 1e9:.1f}" for name, speed in speeds.items())
    rate = machine.reading.bandwidth.bytes_per_second / 1e9
    return f"{rate:.1f} GB/s from memory; weights in {formats} GB/s"


def _distinct(outlooks: Sequence[Outlook]) -> list[Outlook]:
    """One model of each size, to two digits: base and guard models need what the others need."""
    chosen: dict[tuple[str, str], Outlook] = {}
    for outlook in outlooks:
        key = (f"{outlook.parameters:.1e}", outlook.scheme)
        is_better = outlook.is_chat and "guard" not in outlook.model.lower()
        if key not in chosen or is_better:
            chosen[key] = outlook
    return list(chosen.values())


def _models(outlooks: Sequence[Outlook], *, wide: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    from mmchat.doctor.verdict import pace_of

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MODEL")
    table.add_column("SCHEME")
    for heading in ("WEIGHTS", "CACHE", "PICTURE", "WORKING") if wide else ():
        table.add_column(heading, justify="right", style="dim")
    table.add_column("NEEDS", justify="right")
    table.add_column("FITS")
    table.add_column("TOKENS/S", justify="right")
    table.add_column("WITH PICTURE", justify="right")
    shown = ""
    for outlook in outlooks:
        need = outlook.need
        parts = (need.weights, need.cache, need.pictures, need.working)
        fits = {True: ("✔ yes", "green"), False: ("✘ no", "red"), None: ("? unknown", "yellow")}
        cells = [Text(outlook.short if outlook.short != shown else ""), Text(outlook.scheme)]
        cells += [Text(size(part)) for part in parts] if wide else []
        cells += [Text(size(need.total)), Text(*fits[outlook.fits])]
        cells += [Text(pace_of(speed)) for speed in outlook.speeds or ()]
        cells += [] if outlook.speeds else [Text("-"), Text("-")]
        table.add_row(*cells, style="dim" if outlook.fits is False else "")
        shown = outlook.short
    return table


def _legend(machine: Machine) -> str:
    from mmchat.estimate.memory import USUAL_POSITIONS

    where = "on the processor" if machine.device.name == "cpu" else f"on {machine.device.name}"
    return (
        f"In {machine.dtype} {where}, with room for {USUAL_POSITIONS:,} tokens and a picture of 4"
        " tiles. Base and guard models need as much."
    )
