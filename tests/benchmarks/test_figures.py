"""The README's figures are those of the committed results."""

import json
import re
from pathlib import Path

from benchmarks import readme
from benchmarks.plan import parse

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_the_readme_shows_the_committed_results():
    assert readme.updated(README, readme.results()) == README


def test_a_changed_result_changes_the_readme():
    found = readme.results()
    name = found["contestants"][0]
    found["workloads"][0]["contestants"][name]["ms"]["total"]["median"] *= 2
    assert readme.updated(README, found) != README


def test_each_shown_ratio_was_measured_with_its_error():
    found = readme.results()
    shown = re.findall(r"\*\*(\d+\.\d\d)×\*\*", readme.section(found))
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
    assert tuple(made) == readme.RESULTS


def test_the_readme_gives_the_ratios_to_float32():
    path = readme.FIGURES / "cpu-float32.json"
    workloads = json.loads(path.read_text(encoding="utf-8"))["workloads"]

    def ratios(name):
        found = (w["contestants"][name]["speedup"]["total"]["median"] for w in workloads)
        return tuple(f"{ratio:.2f}" for ratio in found)

    text, one, four = ratios("mmchat float32")
    shown = f"reads 64 tokens {text}, a picture of 1 tile {one} and one of 4 tiles {four} times"
    assert shown in " ".join(README.split())
    assert "in int8 {}, {} and {} times".format(*ratios("mmchat int8")) in " ".join(README.split())
