"""What is particular to the programs of AOTI: their weights, and how they are measured."""

import json

import pytest
import torch
from typer.testing import CliRunner

import mmchat
from mmchat.cli.app import app
from tests.export.conftest import answers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def models(tiny_aoti):
    """The model and its export, both in float32."""
    return mmchat.load(None, device="cpu", dtype="float32"), mmchat.load(tiny_aoti)


def test_the_weights_are_used_where_they_lie(models):
    exported = models[1]
    programs = exported.runtime.model._run
    name = "language_model.lm_head.weight"
    before = answers(exported, "Hello", ())
    weight = programs._weights[name]
    kept = weight.clone()
    try:
        weight.copy_(torch.roll(kept, 1, 0))  # a private mapping: the file stays as it is
        assert answers(exported, "Hello", ()) != before
    finally:
        weight.copy_(kept)


def test_the_benchmark_measures_it_beside_the_model(tiny_aoti):
    small = ["--rounds", "1", "--context", "8", "--prompt-tokens", "8", "--vision", "4", "--json"]
    parts = ["--measure", "decode,prefill,picture,bandwidth"]
    done = CliRunner().invoke(app, ["bench", str(tiny_aoti), *small, *parts])
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    plain, exported = record["contestants"]
    assert (plain, exported) == ("mmchat float32", "mmchat float32 exported")
    for workload in record["workloads"]:
        assert workload["contestants"][exported]["agreement"]["relative_error"] < 1e-4
    read = {row["contestant"]: row["bytes_per_token"] for row in record["bandwidth"]["decode"]}
    assert read[plain] == read[exported] > 4_000_000
