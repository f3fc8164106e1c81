"""The built-in model: whole, small enough, and right about pictures that it never saw."""

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

import mmchat
from mmchat.catalog.find import find_model
from mmchat.catalog.known import data_path, find_spec
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest, sha256_of
from mmchat.engine.events import Finished
from mmchat.engine.sampling import SamplingParams
from mmchat.evals.run import judge_scenes, report
from mmchat.evals.scenes import heldout_scenes
from mmchat.evals.scenes.textures import HELDOUT, draw_texture
from mmchat.export import ExportPlan, export_model
from mmchat.images import from_pil
from mmchat.loading.options import LoadOptions
from tests.meta_checkpoint import write_meta_folder

ASSETS = Path(__file__).parents[1] / "assets"  # a wheel has only some
TINY = data_path("assets", "tiny")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=64)


@pytest.fixture(scope="module")
def model():
    return mmchat.load("tiny", device="cpu")


def answer(session, text, *pictures):
    images = [ASSETS / name for name in pictures]
    *_, last = session.send(text, images, GREEDY)
    assert isinstance(last, Finished)
    return last.text


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("dog.jpg", "A brown dog."),
        ("street.jpg", "A blue car, a green tree and a red house."),
        ("shapes.jpg", "A brown square, a red heart and an orange ring."),
        ("fish.jpg", "Three blue fish."),
    ],
)
def test_it_says_what_is_in_the_pictures_of_the_docs(model, picture, caption):
    assert answer(model.chat(), "What's in this image?", picture) == caption


def test_it_answers_about_the_picture_of_the_turn(model):
    session = model.chat()
    assert answer(session, "What's in this image?", "dog.jpg") == "A brown dog."
    assert answer(session, "What colour is the dog?") == "It is brown."
    assert answer(session, "What's in this image?", "street.jpg").startswith("A blue car")


def test_it_compares_two_pictures(model):
    assert "colour" in answer(model.chat(), "What changed?", "before.jpg", "after.jpg")


@pytest.mark.parametrize(
    ("asked", "picture", "expected"),
    [
        ("What is in this picture? Please tell me everything you can see there.", "dog.jpg",
         "A brown dog."),
        ("hey, can you describe what's in the pic for me", "shapes.jpg",
         "A brown square, a red heart and an orange ring."),
        ("how mnay fish can you count here", "fish.jpg", "There are three."),
        ("Could you read out the sign for me?", "sign.jpg", "It says OPEN."),
        ("tell me the color of that car please", "street.jpg", "It is blue."),
    ],
)  # fmt: skip
def test_it_understands_peoples_own_words(model, asked, picture, expected):
    assert answer(model.chat(), asked, picture) == expected


def test_it_knows_what_it_stands_for(model):
    session = model.chat()
    assert answer(session, "Is there a dog?", "dog.jpg") == "Yes, there is a dog."
    assert answer(session, "What colour is it?") == "It is brown."


def test_it_says_of_most_other_pictures_that_it_knows_only_drawings(model):
    said = []
    for name in HELDOUT:
        picture = from_pil(draw_texture(name, 1, 100, 112), source=name)
        *_, last = model.chat().send("What's in this image?", [picture], GREEDY)
        said.append(last.text == "I only know simple drawings.")
    assert sum(said) >= len(said) - 2


def test_without_a_picture_it_asks_for_one(model):
    assert answer(model.chat(), "What's in this image?") == "Please show me a picture."


def test_its_tables_are_zero_where_a_canvas_has_no_tile():
    """As in every checkpoint of the family: the padding tile must get no position of its own."""
    vision = find_spec("tiny").config.vision_config
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


def test_metas_format_holds_it_bit_for_bit(tmp_path):
    """Its tile tables are shared between canvases, as those of every checkpoint of the family."""
    source = find_model("tiny")
    with open_checkpoint(TINY) as ours:
        weights = {name: ours.read(name) for name in ours.entries}
        write_meta_folder(tmp_path / "meta", source.spec, weights, source.tokenizer_file())
    export_model(ExportPlan(LoadOptions(tmp_path / "meta"), tmp_path / "hf", "hf"))
    with open_checkpoint(TINY) as ours, open_checkpoint(tmp_path / "hf") as back:
        assert set(ours.entries) == set(back.entries)
        for name in ours.entries:
            assert torch.equal(ours.read(name), back.read(name)), name


def test_its_shape_can_be_cut_in_four_and_hold_groups_of_256():
    config = find_spec("tiny").config
    vision, text = config.vision_config, config.text_config
    assert vision.attention_heads % 4 == text.num_key_value_heads % 4 == 0
    widths = (vision.hidden_size, vision.intermediate_size, text.hidden_size,
              text.intermediate_size, vision.output_dim)  # fmt: skip
    assert all(width % 256 == 0 for width in widths)


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
    model = mmchat.load("tiny", device="cpu", dtype=dtype)
    verdicts = list(judge_scenes(model, heldout_scenes(150)))
    assert report(verdicts).overall.accuracy > 0.9


@pytest.mark.slow
@pytest.mark.skipif(not (ASSETS / "tiny" / "train.py").exists(), reason="a wheel has no training")
def test_what_trained_it_still_draws_what_it_knows(monkeypatch):
    """The loss of the released weights on training batches of every kind, as training takes it."""
    monkeypatch.syspath_prepend(str(ASSETS / "tiny"))
    from batches import BATCHES, Chat, training_batch
    from trainee import Trainee, tiny_config

    chat = Chat(TINY / "tokenizer.model")
    trainee = Trainee(tiny_config(chat.vocab_size))
    trainee.model.load_state_dict(load_file(TINY / "model.safetensors"))
    kinds = set()
    for index in range(200):
        kind = Random(f"batch 1 {index}").choices(tuple(BATCHES), tuple(BATCHES.values()))[0]
        if kind in kinds:
            continue
        kinds.add(kind)
        batch = training_batch(index, chat, trainee.model.config, seed=1)
        logits, auxiliary = trainee(batch)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        assert loss < 0.5, kind
        (loss + auxiliary).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainee.parameters())
    assert kinds == set(BATCHES)
