"""`mmchat bench` on small shapes, whole: what it prints, and how it ends."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mmchat.bench import entrants
from mmchat.cli import bench_table
from mmchat.cli.app import app
from mmchat.errors import UsageError

SMALL = ["bench", "--shapes", "tiny", "--dtype", "float32", "--device", "cpu", "--rounds", "2"]
QUICK = ["--context", "8", "--prompt-tokens", "8", "--vision", "1,4", "--threads", "1", "-q"]


def run(*arguments):
    return CliRunner().invoke(app, [*SMALL, *QUICK, *arguments])


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "found.json"
    done = run("--vs", "transformers", "--json", "-o", str(path))
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads(path.read_text()) == found
    return found


def test_the_record_says_what_was_measured_and_where(record):
    assert record["contestants"] == ["transformers float32", "mmchat float32"]
    assert record["clock"] == "cpu"
    assert record["model"]["weights"] == "random"
    assert (record["model"]["layers"], record["model"]["vision_layers"]) == (5, 3)
    machine = record["environment"]
    assert (machine["dtype"], machine["device"], machine["threads"]) == ("float32", "cpu", 1)
    assert {"mmchat", "python", "torch", "transformers"} == set(machine["versions"])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], ["none"]),
        (["--quantize", "int8,int4"], ["none", "int8", "int4"]),
        (["--quantize", "none,int8", "--compile", "off,on"],
         ["none", "int8", "none+compiled", "int8+compiled"]),
        (["--compile", "on"], ["none", "none+compiled"]),
    ],
)  # fmt: skip
def test_every_scheme_meets_every_way_of_running_it(asked, expected, monkeypatch):
    seen = []

    def stop(plan, say):
        seen.extend(plan.variants)
        raise UsageError("seen")

    monkeypatch.setattr("mmchat.bench.run.run", stop)
    assert run(*asked).exit_code == 2
    assert [str(variant) for variant in seen] == expected
    assert [type(variant).parse(str(variant)) for variant in seen] == seen


def test_a_way_of_running_that_does_not_exist_is_named():
    done = run("--compile", "off,maybe")
    assert done.exit_code == 2
    assert "'maybe' is neither off nor on" in done.stderr


def test_every_workload_has_times_errors_and_ratios(record):
    titles = [workload["title"] for workload in record["workloads"]]
    assert titles == [
        "a token after 8",
        "a token after 8 and 4 tiles",
        "read 8 tokens",
        "read a picture of 1 tile",
        "read a picture of 4 tiles",
    ]
    for workload in record["workloads"]:
        theirs, ours = (workload["contestants"][name] for name in record["contestants"])
        assert ours["agreement"]["relative_error"] < 1e-4
        assert "agreement" not in theirs
        low, middle, high = (ours["speedup"]["total"][key] for key in ("low", "median", "high"))
        assert 0 < low <= middle <= high
        for found in (theirs, ours):
            assert found["ms"]["total"]["rounds"] == 2
            assert 0 < found["ms"]["total"]["low"] <= found["ms"]["total"]["median"]


def test_the_turns_and_the_bandwidth_are_there(record):
    assert [turns["tiles"] for turns in record["turns"]] == [1, 4]
    for turns in record["turns"]:
        assert set(turns["contestants"]) == {"mmchat float32"}
        assert turns["contestants"]["mmchat float32"]["second_to_first"]["median"] > 0
    decode = record["bandwidth"]["decode"]
    assert [entry["title"] for entry in decode] == [
        "a token after 8",
        "a token after 8 and 4 tiles",
    ]
    assert all(entry["share"] > 0 for entry in decode)


def test_the_lines_of_a_pipe_hold_every_contestant(record, capsys):
    bench_table.show_record(record)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, 5 text and 3 vision layers, random weights; float32 on ")
    assert lines[1].split("\t") == list(bench_table.COLUMNS)
    first = lines[2].split("\t")
    assert first[:2] == ["a token after 8", "transformers float32"]
    assert len({len(line.split("\t")) for line in lines[1:20]}) == 1
    [agreement] = [line for line in lines if "against" in line]
    assert agreement.startswith("mmchat float32 against transformers float32: relative error of")
    assert agreement.endswith("the same likeliest token in 5 of 5")


def test_a_terminal_gets_bars(record, monkeypatch, capsys):
    monkeypatch.setattr(bench_table.console, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "160")
    bench_table.show_record(record)
    out = capsys.readouterr().out
    assert bench_table.bar(1, 1) in out
    assert "a token after 8 and 4 tiles" in out


@pytest.mark.parametrize(
    ("value", "cells"), [(0, ""), (1, "█" * 24), (0.5, "█" * 12), (1 / 48, "▌"), (1 / 192, "▏")]
)
def test_a_bar_is_as_long_as_its_share(value, cells):
    assert bench_table.bar(value, 1) == cells


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.012")],
)
def test_numbers_keep_three_digits(value, shown):
    assert bench_table.number(value) == shown


def test_a_fast_wrong_model_ends_with_1_and_prints_nothing(monkeypatch):
    load = entrants.load_from_tensors

    def damaged(*arguments, **options):
        loaded = load(*arguments, **options)
        norm = loaded.runtime.model.language_model.model.norm
        norm.weight.data = norm.weight * 1.01
        return loaded

    monkeypatch.setattr(entrants, "load_from_tensors", damaged)
    done = run("--vs", "transformers", "--measure", "decode")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "mmchat float32 are 0.01 (relative) away from those of transformers" in done.stderr


def test_a_loaded_model_is_measured_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    arguments = ["bench", "tiny", "--device", "cpu", "--rounds", "1", "--measure", "decode"]
    done = CliRunner().invoke(app, [*arguments, *QUICK, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["weights"] == "as loaded"
    assert found["contestants"] == ["mmchat float32"]


def test_a_quantised_variant_stands_beside_the_plain_one_with_its_error():
    done = run("--quantize", "int8,int4-g32", "--measure", "decode", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["contestants"] == ["mmchat float32", "mmchat int8", "mmchat int4-g32"]
    for workload in found["workloads"]:
        plain, int8, int4 = workload["contestants"].values()
        assert "agreement" not in plain
        errors = [v["agreement"]["relative_error"] for v in (int8, int4)]
        assert 0 < errors[0] < errors[1] < 0.6


def test_once_is_what_a_process_of_its_own_does():
    done = run("--once", "none")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["contestant"] == "mmchat float32"
    assert 0 < found["weight_bytes"] < found["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--vs", "transformers"], "--vs needs --shapes"),
        (["tiny", "--layers", "3"], "--layers needs --shapes"),
        (["tiny", "--shapes", "11B"], "leave MODEL and its paths out"),
        (["--context", "8,x"], "not a list of numbers from 1"),
        (["--measure", "decod"], "'decod' is none of decode,prefill"),
        (["--shapes", "12B"], "no shapes '12B'"),
        (["--quantize", "none,int5"], "unknown quantisation scheme 'int5'"),
    ],
)
def test_usage_errors_are_one_line_and_end_with_2(arguments, message):
    done = CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
