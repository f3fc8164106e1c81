"""`mmchat bench` of the built-in model, whole: what it prints, and how it ends."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mmchat.bench.run import Variant
from mmchat.bench.workloads import DECODED
from mmchat.cli import bench, console
from mmchat.cli.app import app
from mmchat.errors import NumericalError, UsageError

SMALL = ["bench", "tiny", "--device", "cpu", "--rounds", "2", "-q"]
QUICK = ["--context", "8", "--vision", "1,4"]
PICTURE_STAGES = ["first token", "preprocessing", "vision", "prefill", "token"]


def run(*arguments):
    return CliRunner().invoke(app, [*SMALL, *QUICK, *arguments])


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "found.json"
    done = run("--quantize", "none,int8", "--json", "-o", str(path))
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads(path.read_text()) == found
    return found


@pytest.mark.slow
def test_keys_and_values_in_int8_are_said():
    done = run("--kv", "int8")
    assert done.exit_code == 0, done.stderr
    assert "float32, keys and values in int8 on" in " ".join(done.stdout.split())


def test_the_record_says_what_was_timed_and_where(record):
    assert record["model"]["name"] == "tiny"
    machine = record["environment"]
    assert (machine["dtype"], machine["kv"], machine["device"]) == ("float32", "auto", "cpu")
    assert {"mmchat", "python", "torch"} == set(machine["versions"])
    assert set(record["load_seconds"]) == {"float32", "int8"}
    assert record["peak_memory_bytes"] > 10_000_000
    assert record["left_out"] == []


def test_every_stage_has_times_speeds_and_ratios(record):
    stages = [(entry["prompt"], entry["stage"]) for entry in record["measured"]]
    assert stages == [
        ("8 tokens", "read"),
        ("8 tokens", "token"),
        *(("1 tile", stage) for stage in PICTURE_STAGES),
        *(("4 tiles", stage) for stage in PICTURE_STAGES),
    ]
    for entry in record["measured"]:
        assert entry["rounds"] == 2
        first, second = entry["variants"].values()
        assert first["times_as_fast"] is None
        assert 0 < second["times_as_fast"]["low"] <= second["times_as_fast"]["median"]
        for found in (first, second):
            ms, speed = found["milliseconds"], found["tokens_per_second"]
            assert 0 < ms["low"] <= ms["median"] <= ms["high"]
            tokens = {"read": 8, "token": 1}.get(entry["stage"])
            assert (speed is not None) == (tokens is not None)
            if tokens:
                for end, other in (("low", "high"), ("median", "median"), ("high", "low")):
                    assert speed[end] == pytest.approx(1000 * tokens / ms[other], rel=0.01)


def test_a_picture_is_split_into_its_stages(record):
    times = {
        (entry["prompt"], entry["stage"]): entry["variants"]["float32"]["milliseconds"]["low"]
        for entry in record["measured"]
    }
    for prompt in ("1 tile", "4 tiles"):
        parts = sum(times[prompt, stage] for stage in PICTURE_STAGES[1:4])
        assert 0 < parts < 1.01 * times[prompt, "first token"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], ["auto"]),
        (["--quantize", "int8,int4"], ["int8", "int4"]),
        (["--quantize", "none,int8", "--compile", "off,on"],
         ["float32 eager", "int8 eager", "float32 compiled", "int8 compiled"]),
        (["--compile", "on"], ["auto compiled"]),
    ],
)  # fmt: skip
def test_every_scheme_meets_every_way_of_running_it(asked, expected, monkeypatch):
    import torch

    seen = []

    def stop(loaders, *_, **options):
        seen.extend(loaders)
        raise UsageError("seen")

    monkeypatch.setattr("mmchat.bench.run.run", stop)
    assert run(*asked).exit_code == 2
    assert [variant.label(torch.float32) for variant in seen] == expected


def test_what_is_asked_is_what_is_loaded(monkeypatch):
    given = []

    def load(options, source):
        given.append((options.quantize, options.compile, options.dtype))
        raise UsageError("seen")

    monkeypatch.setattr("mmchat.api.load_model", load)
    assert run("--quantize", "int8", "--compile", "on", "--dtype", "bfloat16").exit_code == 2
    assert given == [("int8", "on", "bfloat16")]


def test_every_round_writes_as_many_tokens_whatever_the_model_says(monkeypatch):
    from mmchat.runtime.eager import EagerRuntime

    steps = []
    forward = EagerRuntime.forward

    def counted(self, batch, cache):
        steps.append(batch.starts[0] > 0)
        return forward(self, batch, cache)

    monkeypatch.setattr(EagerRuntime, "forward", counted)
    assert run("--context", "8", "--vision", "1").exit_code == 0
    assert sum(steps) == 2 * (2 + 1) * DECODED  # two workloads, two rounds and the warm-up


def test_the_lines_of_a_pipe_hold_every_variant(record, capsys):
    bench.show_record(record)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny; float32 on ")
    assert lines[1].split("\t") == list(bench.COLUMNS)
    assert lines[2].split("\t")[:2] == ["read 8 tokens", "float32"]
    assert lines[3].split("\t")[:2] == ["read 8 tokens", "int8"]
    table, facts = lines[1:-3], lines[-3:]
    assert len({len(line.split("\t")) for line in table}) == 1
    assert len(table) == 1 + 2 * len(record["measured"])
    assert facts[0] == "medians of 2 rounds"
    assert facts[1].startswith("loaded: float32 in ")
    assert facts[2].startswith("peak memory of all together: ")


def test_a_terminal_gets_a_table_of_one_screen(record, monkeypatch, capsys):
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # nothing bold
    bench.show_record(record)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "float32" in line or "int8" in line][1:-1]
    assert len(rows) == 2 * len(record["measured"])
    assert sum("first token, 4 tiles" in line for line in lines) == 1
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.012")],
)
def test_numbers_keep_three_digits(value, shown):
    assert bench.number(value) == shown


def test_nothing_to_time_still_tells_loading_and_memory():
    done = run("--context", "", "--vision", "")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[2].startswith("loaded: float32 in ")


def test_more_tokens_or_tiles_than_the_model_takes_are_left_out():
    done = run("--context", "8,1000000", "--vision", "5")
    assert done.exit_code == 0, done.stderr
    assert "left out, as the model does not take it: 1,000,000 tokens, 5 tiles" in done.stdout


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (RuntimeError("can't allocate memory"), 5, "out of memory while running the model"),
        (NumericalError("NaN"), 1, "NaN"),
    ],
)
def test_what_ends_the_timing_is_said_in_a_line(problem, code, said, monkeypatch):
    from mmchat.runtime.eager import EagerRuntime

    def fail(*_):
        raise problem

    monkeypatch.setattr(EagerRuntime, "forward", fail)
    done = run()
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "8,x"], "'x' is not a number from 1 to 1,000,000; a list is written 1,4"),
        (["--vision", "0"], "'0' is not a number from 1 to 10,000"),
        (["--vision", "1,x"], "'x' is not a number from 1 to 10,000"),
        (["--context", "9" * 5000], "is not a number from 1 to 1,000,000"),
        (["--quantize", "none,int5"], "unknown quantisation scheme 'int5'"),
        (["--compile", "off,maybe"], "'maybe' is none of auto, off and on"),
        (["--compile", ""], "'' is none of auto, off and on"),
    ],
)
def test_usage_errors_are_one_line_and_end_with_2(arguments, message):
    done = CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_auto_is_shown_as_what_it_became(monkeypatch):
    from mmchat.bench import run as bench_run

    loaded = SimpleNamespace(
        dtype="torch.float32", device="cpu", load_seconds=1.0, peak_memory=lambda: 1,
        options=SimpleNamespace(quantize="int4", kv="auto"),
        spec=SimpleNamespace(name="x", parameters=1),
    )  # fmt: skip
    monkeypatch.setattr(bench_run, "environment", lambda *_: {})
    found = bench_run.run({Variant("auto"): lambda: loaded}, [], print, rounds=1, seconds=1)
    assert list(found["load_seconds"]) == ["int4"]
