"""`python -m benchmarks.compare` on small shapes, whole: what it measures, and how it ends."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import compare, entrants
from benchmarks.compare import main
from benchmarks.plan import parse
from benchmarks.workloads import Field
from mmchat.errors import MemoryError_

SMALL = ["--shapes", "tiny", "--dtype", "float32", "--device", "cpu", "--rounds", "2"]
QUICK = ["--context", "8", "--prompt-tokens", "8", "--vision", "1,4", "--threads", "1"]


def run(path, *arguments):
    main([*SMALL, *QUICK, *arguments, "-o", str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run(tmp_path_factory.mktemp("bench") / "found.json")


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
        ([], ["none auto"]),
        (["--quantize", "int8,int4"], ["none auto", "int8 auto", "int4 auto"]),
        (["--quantize", "none,int8", "--compile", "auto,on"],
         ["none auto", "int8 auto", "none on", "int8 on"]),
        (["--quantize", "int4", "--compile", "on"], ["none on", "int4 on"]),
    ],
)  # fmt: skip
def test_the_plain_model_is_always_there_and_first(asked, expected):
    plan, _ = parse([*SMALL, *asked])
    assert [f"{variant.quantize} {variant.compile}" for variant in plan.variants] == expected


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
    assert all(entry["share"]["low"] > 0 for entry in decode)


def test_rows_at_once_are_timed_beside_one_alone(tmp_path):
    asked = ["--rows", "3", "--measure", "decode", "--vision", ""]
    *_, found = run(tmp_path / "found.json", *asked)["workloads"]
    assert found["title"] == "a token after 8, of 3 rows at once"
    for name, contestant in found["contestants"].items():
        alone, together = (contestant["ms"][stage]["low"] for stage in ("one row", "total"))
        most = 3 * contestant["ms"]["one row"]["high"] / together
        assert contestant["gain"]["high"] <= 1.01 * most  # all are rounded
        assert alone > 0, name


@pytest.mark.slow
def test_a_step_compiled_as_transformers_compiles_it_says_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # its static cache is real
    asked = ["--vs", "compiled", "--measure", "decode", "--rows", "2"]
    found = run(tmp_path / "found.json", *asked)
    names = ["transformers float32", "transformers float32 compiled", "mmchat float32"]
    assert found["contestants"] == names
    for workload in found["workloads"]:
        _, theirs, ours = workload["contestants"].values()
        assert (theirs["against"], ours["against"]) == (names[0], names[1])
        assert theirs["agreement"]["relative_error"] < 1e-5


def test_what_was_measured_is_kept_when_a_later_workload_fails(tmp_path, monkeypatch):
    measure = Field.measure

    def fails_at_a_prompt(self, workload):
        if workload.kind == "prefill":
            raise MemoryError_("no more")
        return measure(self, workload)

    monkeypatch.setattr(Field, "measure", fails_at_a_prompt)
    path = tmp_path / "found.json"
    with pytest.raises(SystemExit):
        run(path, "--vs", "nothing")
    titles = [workload["title"] for workload in json.loads(path.read_text())["workloads"]]
    assert titles == ["a token after 8", "a token after 8 and 4 tiles"]


def test_how_far_the_logits_are_apart_is_said_in_a_line(record):
    [agreement] = compare.agreements(record)
    assert agreement.startswith("mmchat float32 against transformers float32: relative error of")
    assert agreement.endswith("the same likeliest token in 5 of 5")


def test_a_fast_wrong_model_ends_with_1_and_prints_nothing(tmp_path, monkeypatch, capsys):
    load = entrants.load_from_tensors

    def damaged(*arguments, **options):
        loaded = load(*arguments, **options)
        norm = loaded.runtime.model.language_model.model.norm
        norm.weight.data = norm.weight * 1.01
        return loaded

    monkeypatch.setattr(entrants, "load_from_tensors", damaged)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "found.json", "--measure", "decode")
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "mmchat float32 are 0.01 (relative) away from those of transformers" in err
    assert not (tmp_path / "found.json").exists()


def test_a_quantised_variant_stands_beside_the_plain_one_with_its_error(tmp_path, capsys):
    asked = ["--vs", "nothing", "--quantize", "int8,int4-g32", "--measure", "decode"]
    found = run(tmp_path / "found.json", *asked)
    assert found["contestants"] == ["mmchat float32", "mmchat int8", "mmchat int4-g32"]
    for workload in found["workloads"]:
        plain, int8, int4 = workload["contestants"].values()
        assert "agreement" not in plain
        errors = [v["agreement"]["relative_error"] for v in (int8, int4)]
        assert 0 < errors[0] < errors[1] < 0.6
    assert "| | mmchat float32 | mmchat int8 | mmchat int4-g32 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "8,x"], "--context"),
        (["--measure", "decod"], "'decod' is none of decode, prefill"),
        (["--shapes", "12B"], "no shapes '12B'"),
        (["--vs", "llama.cpp", "--measure", "picture"], "llama.cpp knows no pictures"),
        (["--quantize", "none,int5"], "unknown quantisation scheme 'int5'"),
        (["--compile", "off,maybe"], "'off,maybe' is not made of auto, off and on"),
    ],
)
def test_usage_errors_end_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
