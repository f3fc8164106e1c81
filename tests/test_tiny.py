"""The built-in model: whole, small enough, and right about pictures that it never saw."""

import pytest
import torch

import mmchat
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest, sha256_of
from mmchat.evals.run import Tally, judge_scenes
from mmchat.evals.scenes import heldout_scenes
from mmchat.events import Finished
from mmchat.params import data_path, find_params
from mmchat.sampling import SamplingParams

TINY = data_path("assets", "tiny")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=64)


@pytest.fixture(scope="module")
def model():
    return mmchat.load("tiny", device="cpu")


def answer(session, text, *pictures):
    images = [data_path("assets", name) for name in pictures]
    *_, last = session.send(text, images, GREEDY)
    assert isinstance(last, Finished)
    return last.text


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("dog.jpg", "A brown dog."),
        ("street.jpg", "A red house, a green tree and a red car."),
        ("shapes.jpg", "A brown square, a red heart and an orange ring."),
        ("fish.jpg", "Three blue fish."),
    ],
)
def test_it_says_what_is_in_the_pictures_of_the_readme(model, picture, caption):
    assert answer(model.chat(), "What's in this image?", picture) == caption


def test_it_answers_about_the_picture_of_the_turn(model):
    session = model.chat()
    assert answer(session, "What's in this image?", "dog.jpg") == "A brown dog."
    assert answer(session, "What colour is the dog?") == "It is brown."
    assert answer(session, "What's in this image?", "street.jpg").startswith("A red house")


def test_it_compares_two_pictures(model):
    assert "colour" in answer(model.chat(), "What changed?", "before.jpg", "after.jpg")


def test_without_a_picture_it_asks_for_one(model):
    assert answer(model.chat(), "What's in this image?") == "Please show me a picture."


def test_its_tables_are_zero_where_a_canvas_has_no_tile():
    """As in every checkpoint of the family: the padding tile must get no position of its own."""
    vision = find_params("tiny").config.vision_config
    names = [
        "gated_positional_embedding.tile_embedding.weight",
        "pre_tile_positional_embedding.embedding.weight",
        "post_tile_positional_embedding.embedding.weight",
    ]
    with open_checkpoint(TINY) as checkpoint:
        for name in names:
            table = checkpoint.read(f"vision_model.{name}")
            slots = table.view(table.shape[0], vision.max_num_tiles, -1)
            assert not slots[0].any()
            for row, (tiles_h, tiles_w) in enumerate(vision.aspect_ratios, start=1):
                assert slots[row, : tiles_h * tiles_w].any()
                assert not slots[row, tiles_h * tiles_w :].any()


def test_its_weights_are_bfloat16_and_within_16_mib():
    with open_checkpoint(TINY) as checkpoint:
        assert {entry.dtype for entry in checkpoint.entries.values()} == {"bfloat16"}
        assert checkpoint.total_bytes <= 16 * 2**20
        assert all(torch.isfinite(checkpoint.read(name)).all() for name in checkpoint.entries)


def test_its_files_are_those_that_were_recorded():
    manifest = read_manifest(TINY / MANIFEST_NAME)
    assert manifest is not None
    assert set(manifest.files) == {"model.safetensors", "tokenizer.model"}
    for name, record in manifest.files.items():
        assert sha256_of(TINY / name) == record.sha256


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_right_about_most_held_out_scenes(dtype):
    """The card has the figures; far below them something is broken, not untrained."""
    tally = Tally()
    for verdict in judge_scenes(
        mmchat.load("tiny", device="cpu", dtype=dtype), heldout_scenes(130)
    ):
        tally.add(verdict)
    assert tally.report().overall.accuracy > 0.8
