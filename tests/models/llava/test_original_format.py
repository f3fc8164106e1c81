"""Original checkpoints: .bin files with an index, and a vision encoder that lies elsewhere."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmchat
from mmchat.catalog.find import find_model
from mmchat.errors import CheckpointError, UsageError
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions
from mmchat.models.llava import config as config_module
from mmchat.models.llava.build import LlavaBuild
from mmchat.models.llava.tensor_names import hub_name, hub_shapes
from tests.models.asking import run
from tests.models.llava.folders import (
    original_names,
    tower_tensors,
    with_vocabulary,
    write_hub_folder,
)
from tests.models.llava.oracle import TOLERANCE, Pixels, distance, logits, random_weights
from tests.models.llava.released import ORIGINAL_7B
from tests.models.llava.test_image_processor import picture
from tests.models.llava.test_loaded import GREEDY
from tests.sentencepiece_model import trained

REPO = "openai/clip-vit-large-patch14-336"
CONFIG = with_vocabulary(0)
WEIGHTS = {name: tensor.half().float() for name, tensor in random_weights(CONFIG).items()}


@pytest.fixture
def small_tower(monkeypatch):
    """The table's encoder in the size of the tests."""
    sizes = vars(CONFIG.vision_config)
    monkeypatch.setitem(config_module.TOWERS, REPO, dict(sizes))


@pytest.fixture
def folder(tmp_path, small_tower) -> Path:
    """As in liuhaotian's repositories."""
    folder = tmp_path / "llava-v1.5-tiny"
    folder.mkdir()
    text = vars(CONFIG.text_config)
    document = {**ORIGINAL_7B, **text, "mm_hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "tokenizer.model").write_bytes(trained())
    tensors = original_names(WEIGHTS)
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:20],
              "pytorch_model-00002-of-00002.bin": names[20:]}  # fmt: skip
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in shards.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    return folder


def write_tower(folder: Path, **changed: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    torch.save(tower_tensors(WEIGHTS) | changed, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def tower(tmp_path) -> Path:
    return write_tower(tmp_path / "clip")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_it_answers_as_the_same_weights_in_the_hubs_format(folder, tower, tmp_path):
    original = mmchat.load(folder, device="cpu", vision_tower=tower)
    assert original.processor.alpha == "drop"
    assert original.spec.config == replace(CONFIG, features=replace(CONFIG.features, tower=REPO))
    hub = write_hub_folder(tmp_path / "hub-format")
    document = json.loads((hub / "config.json").read_text())
    document["text_config"]["vocab_size"] = CONFIG.vocab_size
    hub = write_hub_folder(tmp_path / "hub-format", WEIGHTS, **document)
    other = mmchat.load(hub, device="cpu")
    question = ("dog", picture(30, 40))
    assert original.ask(*question, sampling=GREEDY) == other.ask(*question, sampling=GREEDY)


def test_every_tensor_comes_out_bit_for_bit(folder, tower):
    source = find_model(folder, vision_tower=tower)
    made_for: Any = source.spec.config
    with source.open_weights() as files:
        found = {n: t.clone() for n, t in LlavaBuild().iter_weights(files, made_for)}
    assert found.keys() == hub_shapes(CONFIG).keys()
    assert all(torch.equal(found[name].float(), WEIGHTS[name]) for name in found)


def test_the_tower_is_found_in_the_cache_and_a_missing_one_is_said(folder, cache):
    with pytest.raises(CheckpointError, match=f"'mmchat download {REPO}' fetches it"):
        mmchat.load(folder, device="cpu")
    assert find_model(folder, checkpoint_required=False).companion is None
    assert mmchat.load(folder, device="cpu", text_only=True).ask("dog", sampling=GREEDY)
    write_tower(cache / f"models--{REPO.replace('/', '--')}" / "snapshots" / ("0" * 40))
    assert mmchat.load(folder, device="cpu").ask("dog", picture(30, 40), sampling=GREEDY)


def test_inspect_says_where_the_tower_is_or_how_to_get_it(folder, tower, cache):
    assert f"'mmchat download {REPO}' fetches it" in run("inspect", str(folder), code=3)
    told = run("inspect", str(folder), "--vision-tower", str(tower))
    assert re.search(rf"^  vision encoder +{re.escape(str(tower))}$", told, re.M)


def test_the_option_takes_a_repository_of_the_cache(folder, cache):
    with pytest.raises(CheckpointError, match="'mmchat download own/clip'"):
        mmchat.load(folder, device="cpu", vision_tower="own/clip")
    write_tower(cache / "models--own--clip" / "snapshots" / ("0" * 40))
    assert find_model(folder, vision_tower="own/clip").companion
    with pytest.raises(CheckpointError, match="no such file or folder"):
        mmchat.load(folder, vision_tower="./nowhere")


def test_no_path_that_a_config_names_is_opened(folder, tower, cache):
    document = json.loads((folder / "config.json").read_text())
    for named in (str(tower), "../clip", "someone/other-tower", 7):
        document["mm_vision_tower"] = named
        (folder / "config.json").write_text(json.dumps(document))
        with pytest.raises(mmchat.MmchatError, match="not a vision encoder that mmchat knows"):
            mmchat.load(folder, device="cpu")
    document["mm_vision_tower"] = "/home/x/models/clip-vit-large-patch14-336"
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"mmchat download {REPO}"):  # the known one is meant
        mmchat.load(folder, device="cpu")


def test_a_tower_of_another_size_is_refused(folder, tmp_path):
    positions = "vision_model.embeddings.position_embedding.weight"
    tower = write_tower(tmp_path / "other", **{positions: torch.zeros(17, 48)})
    with pytest.raises(CheckpointError, match=r"takes pictures of 56 px, and the model .* 70 px"):
        mmchat.load(folder, device="cpu", vision_tower=tower)


def test_transformers_reads_the_folder_that_is_exported_of_it(folder, tower, tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = LoadOptions(folder, device="cpu", vision_tower=tower)
    export_model(ExportPlan(model, tmp_path / "out", "hf"))
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = mmchat.load(tmp_path / "out", device="cpu").runtime.model
    pictures = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    parts = (1, Pixels("a picture", (pictures[0],)), 17, 33)
    ids = [1, *[theirs.config.image_token_id] * 25, 17, 33]
    with torch.inference_mode():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pictures).logits[0]
    assert distance(logits(ours, parts), expected) < TOLERANCE


def test_the_command_to_export_again_names_the_tower(folder, tower, tmp_path):
    model = LoadOptions(folder, device="cpu", vision_tower=tower)
    export_model(ExportPlan(model, tmp_path / "out", "safetensors"))
    exported = LoadOptions(tmp_path / "out").find().exported
    words = shlex.split(exported.again())
    assert words[words.index("--vision-tower") + 1] == str(tower)
    assert LoadOptions(
        exported.source, vision_tower=words[words.index("--vision-tower") + 1]
    ).find()


def test_a_tower_in_gguf_is_refused(folder, tmp_path):
    tower = tmp_path / "clip.gguf"
    tower.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"clip.gguf' is GGUF, and the weights of .* are not"):
        mmchat.load(folder, device="cpu", vision_tower=tower)


def test_a_tower_for_a_checkpoint_that_has_one_is_refused(tmp_path, tower):
    hub = write_hub_folder(tmp_path / "hub-format")
    with pytest.raises(UsageError, match="its vision encoder is among its own weights"):
        mmchat.load(hub, device="cpu", vision_tower=tower)


def test_a_tower_that_was_trained_with_the_rest_is_in_the_checkpoint(folder):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"unfreeze_mm_vision_tower": True}))
    tower = {
        f"model.vision_tower.{name}": tensor
        for name, tensor in WEIGHTS.items()
        if name.startswith("vision_tower.")
    }
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    torch.save(original_names(WEIGHTS) | tower, folder / "pytorch_model.bin")
    model = mmchat.load(folder, device="cpu")
    assert model.ask("dog", picture(30, 40), sampling=GREEDY)


def test_files_with_code_in_them_are_refused(folder, tower):
    class Code:
        def __reduce__(self):
            return (print, ("this must not be printed",))

    torch.save({"x": Code()}, tower / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its pickle is refused"):
        mmchat.load(folder, device="cpu", vision_tower=tower)
    (tower / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match="a bare pickle or tar, which may run code"):
        mmchat.load(folder, device="cpu", vision_tower=tower)


def test_a_missing_shard_is_named(folder, tower):
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin"):
        mmchat.load(folder, device="cpu", vision_tower=tower)


NORM = "vision_tower.vision_model.pre_layrnorm.bias"
UP = "language_model.model.layers.0.mlp.up_proj.weight"
# Spelling of a tensor -> the Hub's.
SPELLINGS = {
    NORM: NORM,
    "model.vision_tower.vision_model.pre_layrnorm.bias": NORM,
    "vision_tower.pre_layrnorm.bias": NORM,
    "model.vision_tower.pre_layrnorm.bias": NORM,
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": NORM,
    "companion.vision_model.pre_layrnorm.bias": NORM,
    "companion.pre_layrnorm.bias": NORM,
    UP: UP,
    "model.language_model.layers.0.mlp.up_proj.weight": UP,
    "model.layers.0.mlp.up_proj.weight": UP,
    "lm_head.weight": "language_model.lm_head.weight",
    "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
    "companion.text_model.x": None,
    "companion.logit_scale": None,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_known(name):
    assert hub_name(name) == SPELLINGS[name]


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    doubled = WEIGHTS | {"model.multi_modal_projector.linear_1.bias": torch.zeros(64)}
    hub = write_hub_folder(tmp_path / "twice", doubled)
    with pytest.raises(CheckpointError, match="two spellings of the same"):
        mmchat.load(hub, device="cpu")
