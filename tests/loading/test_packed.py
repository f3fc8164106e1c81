"""Models that other programs packed answer as a plain checkpoint of the same values does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import mmchat
from mmchat.catalog.find import data_path, find_spec
from mmchat.loading.loader import load
from mmchat.loading.options import LoadOptions
from mmchat.models.mllama.weights import iter_weights
from tests.models.mllama.test_translate import hub_config
from tests.packed_writers import KINDS, is_packed, pack_folder

TINY = data_path("assets", "tiny")
SPEC = find_spec("tiny")


def hub_folder(folder, config=None):
    """config.json and tokenizer of tiny, without weights."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "chat_template.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config or hub_config(SPEC.config)))
    return folder


@pytest.fixture(scope="module")
def weights():
    with LoadOptions("tiny").find().open_weights() as files:
        return {name: t.clone() for name, t in iter_weights(files, SPEC.config)}


def answer(loaded):
    prompt = loaded.processor.chat([mmchat.Message("user", "What colour is it?")])
    request = loaded.request(
        prompt, mmchat.SamplingParams(temperature=0, max_new_tokens=4, logprobs=3)
    )
    return loaded.engine.run(request)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_models_answer_as_plain_ones_of_the_same_values(tmp_path, kind, weights):
    folder = hub_folder(tmp_path / kind)
    pack_folder(folder, kind, weights, hub_config(SPEC.config))
    source = LoadOptions(folder).find()
    assert source.spec.packing is not None
    with source.open_weights() as files:
        exact = {name: t.clone() for name, t in iter_weights(files, SPEC.config)}
    for name, weight in weights.items():
        same = torch.equal(exact[name].to(weight.dtype), weight)
        assert same != is_packed(kind, name), name
    plain = hub_folder(tmp_path / "plain")
    save_file(exact, plain / "model.safetensors")
    options = LoadOptions(folder, dtype="float32", quantize="none")
    ours, theirs = (load(o).runtime.model for o in (options, LoadOptions(plain, dtype="float32")))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
