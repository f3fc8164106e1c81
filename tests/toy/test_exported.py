"""The toy exported, and followed by a second process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import mmchat
from mmchat.cli.app import app
from mmchat.engine.reading import encode
from mmchat.export.aoti import trace
from mmchat.limits import MOST_ROWS
from mmchat.models.base import Batch, ExportLimits
from mmchat.runtime.eager import EagerRuntime
from tests.toy.asking import (
    GREEDY,
    TURNS,
    ask_json,
    assert_close,
    assert_same,
    read,
    run,
    said,
    steps,
    the_toy,
)
from tests.toy.build import ToyBuild
from tests.toy.config import CONFIG
from tests.toy.mirror import MirroredRuntime
from tests.toy.pictures import ask, picture

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
CPU = torch.device("cpu")


# ---- exported


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_an_export_as_safetensors_says_the_same(
    toy: str, png: str, tmp_path: Path, scheme: str
) -> None:
    out = tmp_path / "out"
    run("export", toy, "-o", str(out), "--format", "safetensors", "--quantize", scheme)
    answers = [ask_json(out, png), ask_json(toy, png, "--quantize", scheme)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert json.loads(run("inspect", str(out), "--json"))["export"]["scheme"] == scheme


def test_its_weights_are_rounded_by_samples(toy: str, png: str, tmp_path: Path) -> None:
    samples, out = tmp_path / "samples", tmp_path / "out"
    samples.mkdir()
    Path(png).rename(samples / "picture.png")
    options = ("--format", "safetensors", "--quantize", "int4-g32", "--calibrate", str(samples))
    run("export", toy, "-o", str(out), *options)
    mine, plain = (
        the_toy(model).state_dict()
        for model in (mmchat.load(out), mmchat.load(toy, quantize="int4-g32"))
    )
    levels = [name for name, tensor in plain.items() if tensor.dtype == torch.uint8]
    assert levels
    assert not [name for name in levels if torch.equal(mine[name], plain[name])]
    assert ask_json(out, str(samples / "picture.png"))["output_ids"]


def test_an_export_as_a_folder_of_the_hub_says_the_same(toy: str, png: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", toy, "-o", str(out), "--format", "hf")
    assert (out / "config.json").exists()
    assert not (out / "params.json").exists()
    assert ask_json(out, png)["output_ids"] == ask_json(toy, png)["output_ids"]


@pytest.mark.slow  # as Mllama's, in tests/models/mllama/test_export.py
def test_its_graphs_say_the_same(toy: str) -> None:
    """What is compiled ahead of time, before it is compiled."""
    model = mmchat.load(toy)
    limits = ExportLimits(max_seq_len=128, max_images=2)
    made = ToyBuild().programs("aoti")
    graphs: dict[str, Callable[..., object]] = {}
    for program in made.export_programs(the_toy(model), limits):
        graph, spec = trace(program).module(), pytree.tree_structure(program.args)
        graphs[program.name] = lambda tensors, graph=graph, spec=spec: graph(
            *pytree.tree_unflatten(tensors, spec)
        )

    def call(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        return pytree.tree_leaves(graphs[name](list(tensors)))

    programs = made.model(CONFIG, limits, CPU, torch.float32, call, {})
    prompt = ask(model.processor, "is it ", picture(1), picture(2))
    expected = steps(model.runtime, prompt, b"abcd")
    assert_close(steps(EagerRuntime(programs, CPU), prompt, b"abcd"), expected)
    pieces = [read(EagerRuntime(programs, CPU), programs.new_cache(1, 0), prompt, 4)]
    assert_close(torch.cat(pieces), read(model.runtime, model.runtime.new_cache(1, 0), prompt))
    exported = replace(model, runtime=EagerRuntime(programs, CPU), most_rows=1)
    questions = [text for text, _ in TURNS]
    answers = [list(each.generate_many(questions, GREEDY)) for each in (exported, model)]
    for mine, plain in zip(*answers, strict=True):
        assert_same(mine, plain)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_programs_say_the_same(toy: str, png: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("export", toy, "-o", str(out), "--format", "aoti", "--max-seq-len", "128")
    models = [mmchat.load(folder) for folder in (out, toy)]
    assert [model.most_rows for model in models] == [1, MOST_ROWS]
    for mine, plain in zip(*(said(model, *TURNS) for model in models), strict=True):
        assert_same(mine, plain)


def test_a_format_without_programs_is_refused(toy: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(
        app, ["export", toy, "-o", str(tmp_path / "out"), "--format", "executorch"]
    )
    assert refused.exit_code == 2
    assert "has no programs for executorch; use --format aoti, safetensors or hf" in " ".join(
        refused.stderr.split()
    )


# ---- mirrored


@pytest.mark.process
def test_a_second_process_follows(toy: str) -> None:
    model = mmchat.load(toy)
    mirrored = MirroredRuntime(model.runtime, Path(toy))
    try:
        answers = said(replace(model, runtime=mirrored), *TURNS, ("c" * 40, [picture(2)]))
        assert answers[-1].usage.cached_tokens == 0
        count = len(mirrored.differences)
        assert count == 3 * 8
        prompt = ask(model.processor, picture(1), picture(2), "?")
        cache = mirrored.new_cache(2, 0)
        cache.free(0)  # what the chat left there
        read(mirrored, cache, prompt, piece=4)
        cache.copy(0, 1, 7)
        cache.begin(1, prompt)
        cache.free(0)
        short = ask(model.processor, "short")
        encode(mirrored, short, cache)
        ids = [*short.token_ids, *prompt.token_ids[7:12]]
        rows = Batch(torch.tensor(ids), (0, 1), (0, 7), (len(ids) - 5, 5), (0, len(ids) - 1))
        mirrored.forward(rows, cache)
        assert len(mirrored.differences) > count + 5
        assert max(mirrored.differences) < 1e-6
    finally:
        exit_code = mirrored.close()
    assert exit_code == 0
