"""The README's figures are those of the committed results."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "assets" / "bench" / "update_readme.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def script():
    spec = importlib.util.spec_from_file_location("update_readme", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record():
    return script().results()


def test_the_readme_shows_the_committed_results():
    assert script().updated(README, record()) == README


def test_a_changed_result_changes_the_readme():
    found = record()
    name = found["contestants"][0]
    found["workloads"][0]["contestants"][name]["ms"]["total"]["median"] *= 2
    assert script().updated(README, found) != README


def test_each_shown_ratio_was_measured_with_its_error():
    found = record()
    shown = re.findall(r"\*\*(\d+\.\d\d)×\*\*", script().section(found))
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
    from mmchat.cli.app import load

    [block] = re.findall(r"^```sh long\n(.*?)^```$", README, re.M | re.S)
    made = []
    for line in block.splitlines():
        program, name, *arguments = line.split()
        assert (program, name) == ("mmchat", "bench")
        parsed = load("bench").make_context("bench", arguments).params
        assert (parsed["shapes"], parsed["vs"]) == ("11B", "transformers")
        made.append(ROOT / parsed["output"])
    assert tuple(made) == script().RESULTS


def test_the_readme_gives_the_ratios_to_float32():
    path = SCRIPT.with_name("cpu-float32.json")
    workloads = json.loads(path.read_text(encoding="utf-8"))["workloads"]

    def ratios(name):
        found = (w["contestants"][name]["speedup"]["total"]["median"] for w in workloads)
        return tuple(f"{ratio:.2f}" for ratio in found)

    text, one, four = ratios("mmchat float32")
    shown = f"reads 64 tokens {text}, a picture of 1 tile {one} and one of 4 tiles {four} times"
    assert shown in " ".join(README.split())
    assert "in int8 {}, {} and {} times".format(*ratios("mmchat int8")) in " ".join(README.split())
