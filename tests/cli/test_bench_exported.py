"""`mmchat bench` of an exported folder: beside the model that it was made from."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest, write_manifest
from mmchat.cli.app import app
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions

QUICK = ["--rounds", "2", "--context", "8", "--prompt-tokens", "8", "--vision", "1"]


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


def test_an_export_is_measured_beside_its_model(folder):
    done = bench(folder, "--context", "8,60", "--json", "--measure", "decode,picture,turns")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    plain, exported = record["contestants"]
    assert (plain, exported) == ("mmchat int8", "mmchat int8 exported")
    assert [workload["title"] for workload in record["workloads"]] == [
        "a token after 8",
        "a token after 8 and 1 tile",
        "read a picture of 1 tile",
    ]
    for workload in record["workloads"]:
        found = workload["contestants"][exported]
        assert found["agreement"]["relative_error"] < 1e-3
        assert found["ms"]["total"]["median"] > 0
        assert found["speedup"]["total"]["median"] > 0
    assert set(record["turns"][0]["contestants"]) == {plain, exported}
    assert record["left_out"] == ["a token after 60", "a token after 60 and 1 tile"]


def test_an_export_whose_model_is_gone_is_measured_alone(folder):
    path = folder / MANIFEST_NAME
    write_manifest(path, replace(read_manifest(path), source="/gone/model"))
    done = bench(folder, "--measure", "decode")
    assert done.exit_code == 0, done.stderr
    assert "'/gone/model', which it was made from, is not here to compare with" in done.stderr
    assert "mmchat int8 exported" in done.stdout


def test_a_scheme_that_the_export_does_not_have_is_refused(folder):
    done = bench(folder, "--quantize", "int4")
    assert done.exit_code == 2
    assert "was exported with --quantize int8" in done.stderr
