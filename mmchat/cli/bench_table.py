"""A record of `mmchat bench` on one screen: a table on a terminal, lines with tabs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmchat import words
from mmchat.cli import console

COLUMNS = ("TIMED", "MODEL", "MS", "RANGE", "TOKENS/S", "TIMES AS FAST")


def show_record(record: dict[str, Any]) -> None:
    """Everything to stdout."""
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
