"""The built-in model, exported: it says what the model says. Making an export takes minutes."""

import pytest

import mmchat
from mmchat.engine.sampling import SamplingParams
from mmchat.evals.scenes import heldout_scenes, make_scene
from mmchat.images import from_pil
from tests.export.conftest import GREEDY, answers
from tests.loading.test_loader import finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CANVASES = [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1)]


@pytest.fixture(scope="module", params=["tiny_aoti", "tiny_executorch"])
def models(request):
    """The model and an export of it, both in float32."""
    folder = request.getfixturevalue(request.param)
    return mmchat.load(None, device="cpu", dtype="float32"), mmchat.load(folder)


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
        params = GREEDY
        heard.append([finish(session.send(text, images, params)) for text, images in turns])
    for own, other in zip(*heard, strict=True):
        assert own.output_ids == other.output_ids
        assert own.usage == other.usage
    assert heard[1][1].usage.cached_tokens > 0


def test_the_same_seed_samples_the_same_tokens(models):
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_new_tokens=12)
    first, second = (finish(model.chat().send("Hello", (), params)).output_ids for model in models)
    assert first == second


@pytest.mark.parametrize("drafted", [3, 20])
def test_drafts_are_verified_by_the_programs(models, drafted):
    params = SamplingParams(temperature=0.0, max_new_tokens=24, speculate=drafted)
    text = "red blue red blue red blue red blue red"
    first, second = (finish(m.chat().complete(text, (), params)).output_ids for m in models)
    assert first == second
