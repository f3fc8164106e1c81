"""What was measured, with what it must keep, as a table in docs/server.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "figures" / "serve.json"
PAGE = Path(__file__).parents[2] / "docs" / "server.md"
BEGIN = "<!-- figures: benchmarks/serve writes this -->\n"
END = "<!-- end of figures -->"


@dataclass(frozen=True)
class Figure:
    """bound: what it must keep, None if it is told only; at_least: from which side."""

    what: str
    value: float
    unit: str = ""
    bound: float | None = None
    at_least: bool = False

    @property
    def is_kept(self) -> bool:
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def shown(self, value: float) -> str:
        digits = 2 if self.unit == "×" else 1 if abs(value) < 10 and value % 1 else 0
        return f"{value:,.{digits}f}{'' if self.unit in ('', '×', '%') else ' '}{self.unit}"

    @property
    def row(self) -> str:
        sign = "≥" if self.at_least else "≤"
        wanted = "" if self.bound is None else f"{sign} {self.shown(self.bound)}"
        return f"| {self.what} | {self.shown(self.value)} | {wanted} |"


def section(record: dict[str, Any]) -> str:
    """The heading and the table of what was measured; nothing if nothing was."""
    if not record:
        return ""
    machine = record["machine"]
    rows = [Figure(**one).row for found in record["figures"].values() for one in found]
    return "\n".join(
        [
            "## What it bears",
            "",
            f"The built-in model on {machine['cpu']}, one thread for the model, {machine['date']}:",
            "`python -m benchmarks.serve` measures it again.",
            "",
            "| | found | wanted |",
            "|---|---:|---:|",
            *rows,
            "",
        ]
    )


def updated(page: str, record: dict[str, Any]) -> str:
    """The page with the figures in their place."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + section(record) + END + rest.split(END, 1)[1]
