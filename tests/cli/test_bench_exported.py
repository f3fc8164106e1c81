"""`mmchat bench` of an exported folder: beside the model that it was made from."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import mmchat
from benchmarks.contestants import Mmchat
from benchmarks.workloads import Field, Workload
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest, write_manifest
from mmchat.cli.app import app
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions

QUICK = ["--rounds", "2", "--context", "8", "--vision", "1"]


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    plan = ExportPlan(LoadOptions(dtype="bfloat16", quantize="int8"), out, "safetensors")
    export_model(plan)
    manifest = read_manifest(out / MANIFEST_NAME)
    short = replace(manifest, export=replace(manifest.export, max_seq_len=64))
    write_manifest(out / MANIFEST_NAME, short)
    return out


def bench(folder, *arguments):
    return CliRunner().invoke(app, ["bench", str(folder), *QUICK, *arguments])


def test_an_export_is_timed_beside_its_model(folder):
    done = bench(folder, "--context", "8,60", "--json")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    plain, exported = record["load_seconds"]
    assert (plain, exported) == ("int8", "int8 exported")
    assert {entry["prompt"] for entry in record["measured"]} == {"8 tokens", "1 tile"}
    for entry in record["measured"]:
        assert entry["variants"][exported]["milliseconds"]["median"] > 0
        assert entry["variants"][exported]["times_as_fast"]["median"] > 0
    assert record["left_out"] == ["60 tokens"]


@pytest.mark.parametrize(
    "workload", [Workload("decode", 8), Workload("decode", 8, 1), Workload("picture", 0, 1)]
)
def test_an_export_says_the_same_as_its_model(folder, workload):
    plain = mmchat.load("tiny", device="cpu", dtype="bfloat16", quantize="int8")
    pair = Mmchat("plain", plain), Mmchat("exported", mmchat.load(folder))
    field = Field(pair, {"exported": 1e-3}, pair[0], rounds=1, seconds=60)
    assert field.measure(workload).agreements["exported"].relative_error < 1e-3


def test_an_export_whose_model_is_gone_is_timed_alone(folder):
    path = folder / MANIFEST_NAME
    write_manifest(path, replace(read_manifest(path), source="/gone/model"))
    done = bench(folder)
    assert done.exit_code == 0, done.stderr
    assert "'/gone/model', which it was made from, is not here to compare with" in done.stderr
    assert "int8 exported" in done.stdout


def test_a_scheme_that_the_export_does_not_have_is_refused(folder):
    done = bench(folder, "--quantize", "int4")
    assert done.exit_code == 2
    assert "was exported with --quantize int8" in done.stderr
