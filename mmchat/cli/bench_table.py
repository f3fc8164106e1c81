"""A benchmark's record as tables with bars on a terminal, as tab-separated lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmchat import words
from mmchat.cli import console

_BAR = 24  # cells of the slowest
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Row:
    """One contestant in one workload. milliseconds: for the bar; cells: as shown."""

    title: str
    contestant: str
    milliseconds: float
    cells: tuple[str, ...]


COLUMNS = ("MEASURED", "BY", "MS", "RANGE", "TIMES AS FAST", "RANGE", "ERROR", "ROUNDS")


def show_record(record: dict[str, Any]) -> None:
    """Everything to stdout."""
    rows = list(workload_rows(record))
    if not console.is_terminal(sys.stdout):
        _print_lines(record, rows)
        return
    out = console.stdout_console()
    out.print(headline(record), style="bold")
    out.print(_table(rows))
    for fact in facts(record):
        out.print(fact)


def headline(record: dict[str, Any]) -> str:
    """What was measured, where, and by which clock."""
    model, machine = record["model"], record["environment"]
    versions = machine["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {words.plural(machine['threads'], 'thread')}"
    made = f"{model['name']}, {model['layers']} text and {model['vision_layers']} vision layers"
    random = ", random weights" if model["weights"] == "random" else ""
    clock = {"cpu": "processor time", "wall": "wall clock"}[record["clock"]]
    with_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{made}{random}; {machine['dtype']} on {where}; {clock}; {with_versions}"


def workload_rows(record: dict[str, Any]) -> Iterator[Row]:
    """The rows of all workloads, then of the turns about a picture."""
    for workload in record["workloads"]:
        for name, found in workload["contestants"].items():
            yield _row(workload["title"], name, found, "total")
            for stage in ("vision", "cross_key_values", "prefill"):
                if stage in found["ms"]:
                    yield _row(f"  {stage.replace('_', ' ')}", name, found, stage)
    for turns in record.get("turns", ()):
        for name, found in turns["contestants"].items():
            for stage in found["ms"]:
                title = f"{stage}, {words.plural(turns['tiles'], 'tile')}"
                yield _row(title, name, found, stage)


def _row(title: str, name: str, found: dict[str, Any], stage: str) -> Row:
    ms = found["ms"][stage]
    speedup = found.get("speedup", {}).get(stage)
    agreement = found.get("agreement") if stage == "total" else None
    cells = (
        number(ms["median"]),
        f"{number(ms['low'])} to {number(ms['high'])}",
        f"{speedup['median']:.2f}" if speedup else "",
        f"{speedup['low']:.2f} to {speedup['high']:.2f}" if speedup else "",
        f"{agreement['relative_error']:.1e}" if agreement else "",
        str(ms["rounds"]),
    )
    return Row(title, name, ms["median"], cells)


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def bar(value: float, largest: float) -> str:
    """A bar of `value` where `largest` fills all cells."""
    eighths = round(8 * _BAR * value / largest) if largest > 0 else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _table(rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate((*COLUMNS[:3], "", *COLUMNS[3:])):
        table.add_column(
            column, justify="left" if index in (0, 1, 3) else "right", no_wrap=index == 3
        )
    largest = 0.0
    previous = ""
    for row in rows:
        if row.title != previous and not row.title.startswith(" "):
            same = [r.milliseconds for r in rows if r.title == row.title]
            largest = max(same)
        title = row.title if row.title != previous else ""
        drawn = bar(row.milliseconds, largest)
        table.add_row(title, row.contestant, row.cells[0], drawn, *row.cells[1:])
        previous = row.title
    return table


def facts(record: dict[str, Any]) -> Iterator[str]:
    """Agreement, bandwidth, memory and start-up, a line each."""
    yield from _agreements(record)
    if record.get("left_out"):
        yield f"left out, for want of positions: {'; '.join(record['left_out'])}"
    bandwidth = record.get("bandwidth")
    if bandwidth:
        speed = bandwidth["probe_gigabytes_per_second"]
        threads = words.plural(bandwidth["threads"], "thread")
        yield f"memory is read at {speed:.1f} GB/s ({threads})"
        for entry in bandwidth["decode"]:
            yield (
                f"  {entry['contestant']}, {entry['title']}: "
                f"{entry['gigabytes_per_second']:.1f} GB/s, {100 * entry['share']:.0f} %"
            )
    for entry in record.get("memory", ()):
        yield (
            f"peak memory of {entry['contestant']}: {words.size(entry['peak_memory_bytes'])}, "
            f"of which weights {words.size(entry['weight_bytes'])}"
        )
    for name, seconds in record.get("startup", {}).get("seconds", {}).items():
        yield f"{name}: {seconds['wall']:.2f} s ({seconds['cpu']:.2f} s of processor time)"


def _agreements(record: dict[str, Any]) -> Iterator[str]:
    """How far each contestant's logits are from those of the first, over all workloads."""
    reference, *others = record["contestants"]
    for name in others:
        found = [workload["contestants"][name]["agreement"] for workload in record["workloads"]]
        if found:
            error, kl = (max(each[key] for each in found) for key in ("relative_error", "kl"))
            same = sum(each["top1"] for each in found)
            yield (
                f"{name} against {reference}: relative error of logits up to {error:.1e}, "
                f"KL up to {kl:.1e} nats, the same likeliest token in {same} of {len(found)}"
            )


def _print_lines(record: dict[str, Any], rows: list[Row]) -> None:
    console.write_out(headline(record) + "\n")
    console.write_out("\t".join(COLUMNS) + "\n")
    for row in rows:
        console.write_out("\t".join((row.title, row.contestant, *row.cells)) + "\n")
    for fact in facts(record):
        console.write_out(fact + "\n")
