"""The figures of docs/speed.md are those of the committed results."""

import copy
import re

import pytest

from benchmarks import peers, table

PAGE = table.PAGE.read_text(encoding="utf-8")
FOUND = table.results()


def test_the_page_shows_the_committed_results():
    assert table.updated(PAGE, FOUND) == PAGE


def test_a_changed_result_changes_the_page():
    found = copy.deepcopy(FOUND)
    record = found["llama.cpp"]
    record["workloads"][0]["contestants"][record["contestants"][0]]["ms"]["total"]["median"] *= 2
    assert table.updated(PAGE, found) != PAGE


@pytest.mark.parametrize("part", FOUND)
def test_each_shown_ratio_was_measured_in_rounds_and_with_its_error(part):
    record = FOUND[part]
    shown = re.findall(r"\*\*(\d+\.\d\d)×\*\* \((\d+\.\d\d)–(\d+\.\d\d)\)", table.section(record))
    measured = []
    for workload in record["workloads"]:
        for contestant in workload["contestants"].values():
            assert contestant["ms"]["total"]["rounds"] >= 2
            ratio = contestant.get("speedup", {}).get("total") or contestant.get("times")
            if ratio:
                assert ratio["low"] <= ratio["median"] <= ratio["high"]
                measured.append(tuple(f"{ratio[key]:.2f}" for key in ("median", "low", "high")))
    assert shown == measured
    assert record["clock"] == "cpu"
    assert record["environment"]["threads"] == 1


def test_every_peer_was_measured():
    assert {"llama.cpp", "linears"} <= FOUND.keys() <= set(peers.PARTS)
    assert FOUND["linears"]["contestants"] == ["mmchat", "ONNX Runtime", "OpenVINO"]


def test_a_goal_is_reached_from_its_figure_on():
    goals = list(table.goals(FOUND))
    assert len(goals) >= 12
    text = table.goal_table(FOUND)
    for what, least, found in goals:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
        assert line.endswith("| not reached |") == (found["median"] < least)
