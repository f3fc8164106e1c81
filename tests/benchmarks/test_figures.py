"""The figures of docs/speed.md are those of the committed results."""

import json
import re
from pathlib import Path

from benchmarks import table
from benchmarks.plan import parse

ROOT = Path(__file__).parents[2]
PAGE = table.PAGE.read_text(encoding="utf-8")
COMMANDS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_the_page_shows_the_committed_results():
    assert table.updated(PAGE, table.results()) == PAGE


def test_a_changed_result_changes_the_page():
    found = table.results()
    name = found["contestants"][0]
    found["workloads"][0]["contestants"][name]["ms"]["total"]["median"] *= 2
    assert table.updated(PAGE, found) != PAGE


def test_each_shown_ratio_was_measured_with_its_error():
    found = table.results()
    shown = re.findall(r"\*\*(\d+\.\d\d)×\*\*", table.section(found))
    measured = [
        f"{contestant['speedup']['total']['median']:.2f}"
        for workload in found["workloads"]
        for contestant in list(workload["contestants"].values())[1:]
    ]
    assert shown == measured
    for workload in found["workloads"]:
        for contestant in list(workload["contestants"].values())[1:]:
            assert contestant["agreement"]["relative_error"] >= 0


def test_the_commands_that_make_the_results_are_understood():
    [block] = re.findall(r"^```sh long\n(.*?)^```$", COMMANDS, re.M | re.S)
    made = []
    for line in block.splitlines():
        start, arguments = line.split()[:3], line.split()[3:]
        assert start == ["python", "-m", "benchmarks.compare"]
        plan, output, _ = parse(arguments)
        assert (plan.shapes.name, plan.transformers) == ("11B", True)
        made.append(ROOT / output)
    assert tuple(made) == table.RESULTS


def test_the_page_gives_the_ratios_to_float32():
    path = table.FIGURES / "cpu-float32.json"
    workloads = json.loads(path.read_text(encoding="utf-8"))["workloads"]

    def ratios(name):
        found = (w["contestants"][name]["speedup"]["total"]["median"] for w in workloads)
        return tuple(f"{ratio:.2f}" for ratio in found)

    plain, int8 = ratios("mmchat float32"), ratios("mmchat int8")
    what = ("read 64 tokens", "read a picture of 1 tile", "read a picture of 4 tiles")
    for row in zip(what, plain, int8, strict=True):
        assert f"| {' | '.join(row)} |\n" in PAGE
