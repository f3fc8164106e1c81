"""What is particular to the programs of AOTI: their weights, and how they are measured."""

import json

import pytest
import torch
from typer.testing import CliRunner

import mmchat
from benchmarks.contestants import Mmchat
from benchmarks.traffic import decode_bytes
from benchmarks.workloads import Field, Workload
from mmchat.cli.app import app
from tests.export.conftest import answers, commands_of_the_page
from tests.test_readme import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def models(tiny_aoti):
    """The model and its export, both in float32."""
    return mmchat.load(None, device="cpu", dtype="float32"), mmchat.load(tiny_aoti)


def test_it_answers_as_the_page_says(tiny_aoti):
    [_, asks] = commands_of_the_page()
    done = run(asks, TMPDIR=str(tiny_aoti.parent))
    assert (done.returncode, done.stdout) == (0, "A brown dog.\n"), done.stderr


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


def test_the_benchmark_times_it_beside_the_model(tiny_aoti):
    small = ["--rounds", "1", "--context", "8", "--vision", "4", "--json"]
    done = CliRunner().invoke(app, ["bench", str(tiny_aoti), *small])
    assert done.exit_code == 0, done.stderr
    for entry in json.loads(done.stdout)["measured"]:
        assert list(entry["variants"]) == ["float32", "float32 exported"]


def test_it_says_the_same_as_the_model_and_reads_as_many_bytes(models):
    pair = tuple(map(Mmchat, ("plain", "exported"), models))
    field = Field(pair, {"exported": 1e-4}, pair[0], rounds=1, seconds=60)
    for workload in (
        Workload("decode", 8),
        Workload("decode", 8, 4),
        Workload("prefill", 8),
        Workload("picture", 0, 4),
    ):
        assert field.measure(workload).agreements["exported"].relative_error < 1e-4
    plain, exported = (decode_bytes(model, 8, 4) for model in models)
    assert plain == exported > 4_000_000
