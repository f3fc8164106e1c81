"""The built-in model in ExecuTorch: it says what the model says. Lowering takes minutes."""

import subprocess
import sys

import pytest
import torch

import mmchat
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest
from mmchat.errors import ContextLengthExceeded, ExportError
from mmchat.evals.run import greedy
from mmchat.evals.scenes import heldout_scenes, make_scene
from mmchat.images import from_pil
from mmchat.runtime.executorch import PROGRAM_NAME
from mmchat.sampling import SamplingParams
from tests.test_loader import finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def models(tiny_executorch):
    """The model and its export."""
    return mmchat.load(None, device="cpu", dtype="float32"), mmchat.load(tiny_executorch)


def answers(model, question, pictures):
    images = [from_pil(picture) for picture in pictures]
    session = model.chat()
    done = finish(session.send(question, images, greedy(model.sampling_defaults)))
    return done.output_ids


def test_the_same_tokens_on_heldout_scenes(models):
    for scene in heldout_scenes(12):
        question = scene.questions[0].text
        first, second = (answers(model, question, scene.pictures) for model in models)
        assert first == second, scene.seed


@pytest.mark.parametrize("canvas", [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_the_same_tokens_on_every_number_of_tiles(models, canvas):
    scene = make_scene(7, "heldout", kind="objects", canvas=canvas)
    for question in scene.questions[:2]:
        first, second = (answers(model, question.text, scene.pictures) for model in models)
        assert first == second


def test_the_same_tokens_about_two_pictures(models):
    scene = make_scene(5, "heldout", kind="pair")
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


def test_the_logits_are_the_models_at_every_length(models):
    """Over the borders of the cache's steps and of the pieces that a text is read in."""
    ids = torch.randint(1, 200, (1, 600), generator=torch.Generator().manual_seed(1))
    caches = [model.runtime.new_cache(1, 8) for model in models]
    begin = 0
    for count in (1, 2, 3, 128, 16, 106, 1, 17, 200, 1):
        piece = ids[:, begin : begin + count]
        own, other = (
            model.runtime.verify(piece, cache) for model, cache in zip(models, caches, strict=True)
        )
        assert (own - other).abs().max() < 1e-3 * own.abs().max(), begin
        begin += count


def test_drafts_are_verified_by_the_programs(models):
    params = SamplingParams(temperature=0.0, max_new_tokens=24, speculate=20)
    text = "red blue red blue red blue red blue red"
    first, second = (finish(m.chat().complete(text, (), params)).output_ids for m in models)
    assert first == second


def test_a_longer_text_or_more_pictures_name_the_way_out(models):
    exported = models[1]
    with pytest.raises(ContextLengthExceeded):
        finish(exported.chat().send("red " * 1100, (), greedy(exported.sampling_defaults)))
    pictures = [from_pil(p) for s in heldout_scenes(4) for p in s.pictures[:1]]
    with pytest.raises(ExportError, match="exported for 3; export it again"):
        finish(exported.chat().send("And?", pictures, greedy(exported.sampling_defaults)))


def test_the_file_holds_the_weights_once(tiny_executorch, models):
    weights = sum(p.numel() * 4 for p in models[0].runtime.model.parameters())
    size = (tiny_executorch / PROGRAM_NAME).stat().st_size
    assert weights < size < 1.1 * weights
    assert not list(tiny_executorch.glob("*.safetensors"))
    record = read_manifest(tiny_executorch / MANIFEST_NAME).export
    assert record.executorch.startswith("1.")
    assert record.programs


def test_loading_is_silent(tiny_executorch, capfd):
    model = mmchat.load(tiny_executorch)
    assert answers(model, "Hello", ())
    assert capfd.readouterr().err == ""


def test_the_compiler_is_not_imported_to_run(tiny_executorch):
    program = (
        "import sys, mmchat;"
        f"model = mmchat.load({str(tiny_executorch)!r});"
        "print(model.chat().ask('Hello'));"
        "print([n for n in ('executorch.exir', 'torchao', 'torch._dynamo') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[1:] == ["[]"], done.stderr
