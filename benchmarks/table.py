"""A record as a table, and the committed ones in docs/speed.md: `python -m benchmarks.table`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
FIGURES = Path(__file__).with_name("figures")
RESULTS = (FIGURES / "cpu.json", FIGURES / "cpu-pictures.json")
WIDTHS = {name: widths for widths, name in SHAPES.items()}
BEGIN = "<!-- results: benchmarks/table.py writes this -->\n"
END = "<!-- end of results -->"


def results() -> dict[str, Any]:
    """Those of text with the workloads of pictures, which were measured by themselves."""
    text, pictures = (json.loads(path.read_text(encoding="utf-8")) for path in RESULTS)
    return {**text, "workloads": [*text["workloads"], *pictures["workloads"]]}


def section(record: dict[str, Any]) -> str:
    """One row for each workload, one column for each contestant."""
    names = record["contestants"]
    lines = [_facts(record), "", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for workload in record["workloads"]:
        cells = [_cell(workload["contestants"][name]) for name in names]
        lines.append(f"| {workload['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any]) -> str:
    median = found["ms"]["total"]["median"]
    shown = f"{median / 1000:.1f} s" if median >= 10_000 else f"{median:,.0f} ms"
    ratio = found.get("speedup", {}).get("total")
    return f"{shown}, **{ratio['median']:.2f}×**" if ratio else shown


def _facts(record: dict[str, Any]) -> str:
    model, machine = record["model"], record["environment"]
    versions = (
        f"{n} {v}" for n, v in machine["versions"].items() if n in ("torch", "transformers")
    )
    clock = "processor time" if record["clock"] == "cpu" else "wall clock"
    where = (
        machine.get("gpu") or f"{machine['cpu']} ({_isa(machine)}), {machine['threads']} thread(s)"
    )
    depth = f"{model['layers']} text and {model['vision_layers']} vision layers"
    widths = WIDTHS.get(model["name"], model["name"])
    return (
        f"Widths of {widths}, {depth}, the whole vocabulary, random weights.\n"
        f"{where}, {clock}.\n"
        f"{', '.join(versions)}; {machine['date']}."
    )


def _isa(machine: dict[str, Any]) -> str:
    best = [n for n in ("amx_tile", "avx512_vnni", "avx512f", "avx2") if n in machine["isa"]]
    return best[0] if best else "no vector instructions known"


def updated(page: str, record: dict[str, Any]) -> str:
    """The page with the results in their place."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + section(record) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write the figures into docs/speed.md.").parse_args()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), results()), encoding="utf-8")
