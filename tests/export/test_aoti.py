"""The built-in model, compiled: it says what the model says. Compiling takes minutes."""

import json

import pytest
import torch
from typer.testing import CliRunner

import mmchat
from mmchat.cli.app import app
from mmchat.evals.run import greedy
from mmchat.evals.scenes import heldout_scenes, make_scene
from mmchat.images import from_pil
from mmchat.sampling import SamplingParams
from tests.test_loader import finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CANVASES = [(1, 1), (1, 3), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def models(tiny_aoti):
    """The model and its export, both in float32."""
    return mmchat.load(None, device="cpu", dtype="float32"), mmchat.load(tiny_aoti)


def answers(model, question, pictures):
    images = [from_pil(picture) for picture in pictures]
    session = model.chat()
    done = finish(session.send(question, images, greedy(model.sampling_defaults)))
    return done.output_ids


def test_the_same_tokens_on_50_heldout_scenes(models):
    for scene in heldout_scenes(50):
        question = scene.questions[0].text
        first, second = (answers(model, question, scene.pictures) for model in models)
        assert first == second, scene.seed


@pytest.mark.parametrize("canvas", CANVASES)
def test_the_same_tokens_on_every_kind_of_canvas(models, canvas):
    scene = make_scene(7, "heldout", kind="objects", canvas=canvas)
    for question in scene.questions[:3]:
        first, second = (answers(model, question.text, scene.pictures) for model in models)
        assert first == second


def test_the_same_tokens_about_two_pictures(models):
    scene = make_scene(5, "heldout", kind="pair")
    assert len(scene.pictures) == 2
    for question in scene.questions:
        first, second = (answers(model, question.text, scene.pictures) for model in models)
        assert first == second


def test_three_turns_with_a_new_picture_and_a_cached_one(models):
    scene = make_scene(5, "heldout", kind="pair")
    one, two = (from_pil(picture) for picture in scene.pictures)
    turns = [("What is here?", [one]), ("What colour is it?", []), ("And here?", [two])]
    heard = []
    for model in models:
        session = model.chat()
        params = greedy(model.sampling_defaults)
        heard.append([finish(session.send(text, images, params)) for text, images in turns])
    for own, other in zip(*heard, strict=True):
        assert own.output_ids == other.output_ids
        assert own.usage == other.usage
    assert heard[1][1].usage.cached_tokens > 0


def test_the_same_seed_samples_the_same_tokens(models):
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_new_tokens=12)
    first, second = (finish(model.chat().send("Hello", (), params)).output_ids for model in models)
    assert first == second


def test_drafts_are_verified_by_the_programs(models):
    params = SamplingParams(temperature=0.0, max_new_tokens=24, speculate=3)
    text = "red blue red blue red blue red blue red"
    first, second = (finish(m.chat().complete(text, (), params)).output_ids for m in models)
    assert first == second


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
