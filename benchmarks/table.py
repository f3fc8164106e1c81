"""Records as tables, and the committed ones in docs/speed.md: `python -m benchmarks.table`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
FIGURES = Path(__file__).with_name("figures")
RESULTS = FIGURES / "peers.json"
WIDTHS = {name: widths for widths, name in SHAPES.items()}
BEGIN = "<!-- results: benchmarks/table.py writes this -->\n"
END = "<!-- end of results -->"


def results() -> dict[str, Any]:
    """What benchmarks.peers measured, part by part."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def section(record: dict[str, Any]) -> str:
    """One row for each workload, one column for each contestant."""
    names = record["contestants"]
    lines = [_facts(record), "", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for workload in record["workloads"]:
        cells = [_cell(workload["contestants"][name]) for name in names]
        lines.append(f"| {workload['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any]) -> str:
    """The median time, and the ratio with the range of the rounds."""
    median = found["ms"]["total"]["median"]
    shown = f"{median / 1000:.1f} s" if median >= 10_000 else f"{median:,.{median < 20:d}f} ms"
    ratio = found.get("speedup", {}).get("total") or found.get("times")
    return f"{shown}, {ranged(ratio)}" if ratio else shown


def ranged(found: dict[str, float]) -> str:
    return f"**{found['median']:.2f}×** ({found['low']:.2f}–{found['high']:.2f})"


def _facts(record: dict[str, Any]) -> str:
    machine = record["environment"]
    left_out = ("mmchat", "python")
    versions = (f"{n} {v}" for n, v in machine["versions"].items() if n not in left_out)
    clock = "processor time" if record["clock"] == "cpu" else "wall clock"
    where = (
        machine.get("gpu") or f"{machine['cpu']} ({_isa(machine)}), {machine['threads']} thread(s)"
    )
    return f"{_what(record)}\n{where}, {clock}.\n{', '.join(versions)}; {machine['date']}."


def _what(record: dict[str, Any]) -> str:
    if "model" not in record:
        widths = " to ".join(f"{width:,}" for width in record["widths"])
        return f"{record['layers']} layers, {widths} and back, random weights."
    model = record["model"]
    depth = f"{model['layers']} text and {model['vision_layers']} vision layers"
    widths = WIDTHS.get(model["name"], model["name"])
    return f"Widths of {widths}, {depth}, the whole vocabulary, random weights."


def _isa(machine: dict[str, Any]) -> str:
    best = [n for n in ("amx_tile", "avx512_vnni", "avx512f", "avx2") if n in machine["isa"]]
    return best[0] if best else "no vector instructions known"


# ---- beside the goals ---------------------------------------------------------------------------

_ROWS = "a token after 64, of 8 rows at once"
# What the project set itself: part, contestant, workload, which figure, at least so much.
GOALS = (
    ("llama.cpp", "mmchat int4", "a token after 64", "speedup", 1.7),
    *(
        ("llama.cpp", f"mmchat {scheme}", f"read {count} tokens", "speedup", 1.8)
        for scheme in ("int4", "int8")
        for count in (128, 512)
    ),
    ("llama.cpp", "mmchat int4", _ROWS, "gain", 3.0),
    ("llama.cpp", "mmchat int8", _ROWS, "gain", 3.0),
    ("llama.cpp", "mmchat bfloat16", _ROWS, "gain", 2.6),
    ("llama.cpp", "mmchat int4", "a token after 64", "read", 0.92),
    ("llama.cpp", "mmchat int8", "a token after 64", "read", 0.92),
    ("linears", "mmchat", "int4, 64 rows", "dots", 0.8),
    ("linears", "mmchat", "int8, 64 rows", "dots", 0.8),
    ("transformers float32", "mmchat int8", "read a picture of 1 tile", "speedup", 5.0),
    ("transformers float32", "mmchat int8", "read a picture of 4 tiles", "speedup", 2.0),
    ("transformers float32", "mmchat float32", "read a picture of 4 tiles", "speedup", 1.3),
)
WORDS = {
    "speedup": "times as fast as",
    "gain": "tokens by those of one row",
    "read": "share of the speed of memory",
    "dots": "share of the integer ceiling",
}


def goals(found: dict[str, Any]) -> Iterator[tuple[str, float, dict[str, float]]]:
    """What, at least so much, and median and range; of the parts that were measured."""
    for part, name, title, key, least in GOALS:
        workloads = {
            one["title"]: one["contestants"] for one in found.get(part, _NONE)["workloads"]
        }
        if title not in workloads:
            continue
        ours = workloads[title][name]
        words = f"{name.removeprefix('mmchat')}, {title}".strip(", ") + f": {WORDS[key]}"
        if key == "speedup":
            yield f"{words} {ours['against']}", least, ours["speedup"]["total"]
        elif key == "gain":
            yield words, least, ours["gain"]
        elif key == "read":
            decode = found[part]["bandwidth"]["decode"]
            [share] = [d["share"] for d in decode if (d["contestant"], d["title"]) == (name, title)]
            yield words, least, share
        elif key in ours["shares"]:
            yield words, least, ours["shares"][key]


_NONE: dict[str, Any] = {"workloads": ()}


def goal_table(found: dict[str, Any]) -> str:
    lines = ["| | goal | measured | |", "|---|---:|---:|---|"]
    for what, least, value in goals(found):
        met = "reached" if value["median"] >= least else "not reached"
        shown = f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
        lines.append(f"| {what} | {least:g} | {shown} | {met} |")
    return "\n".join(lines) + "\n"


def _speeds(found: dict[str, Any]) -> str:
    """What the core does at best, in the last rounds of linear layers."""
    machine = found["linears"]["workloads"][-1]["machine"]
    shown = f"In a second this core reads {machine['read']['median']:.0f} GB"
    if "dots" in machine:
        shown += f" and does {machine['dots']['median']:,.0f} billion operations on 8-bit numbers"
    return f"{shown}.\n"


def whole(found: dict[str, Any]) -> str:
    """All tables, each under the name of its part."""
    titles = {name: f"Beside {name}" for name in found} | {"linears": "Linear layers"}
    parts = [f"### {titles[name]}\n\n{section(record)}" for name, record in found.items()]
    return "\n".join([*parts, f"### Goals\n\n{_speeds(found)}\n{goal_table(found)}"])


def updated(page: str, found: dict[str, Any]) -> str:
    """The page with the results in their place."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + whole(found) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write the figures into docs/speed.md.").parse_args()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), results()), encoding="utf-8")
