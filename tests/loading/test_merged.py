"""Merged fine-tunes as people have them: prefixes, .bin, added tokens, the text model alone."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import mmchat
from mmchat.catalog import spec as spec_module
from mmchat.catalog.known import data_path, find_spec
from mmchat.catalog.spec import load_spec, params_document
from mmchat.cli.app import app
from mmchat.errors import CheckpointError, ParamsError, UsageError
from mmchat.loading.options import LoadOptions
from mmchat.models.mllama.build import MllamaBuild
from tests.loading.test_packed import hub_folder
from tests.models.mllama.test_translate import hub_config

BUILD = MllamaBuild()

SPEC = find_spec("tiny")
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
DOG = str(data_path("assets", "dog.jpg"))
ROWS, IMAGE = SPEC.config.vocab_size, SPEC.config.image_token_id


@pytest.fixture(scope="module")
def weights():
    with LoadOptions("tiny").find().open_weights() as files:
        return {name: t.clone() for name, t in BUILD.iter_weights(files, SPEC.config)}


def answer(folder, *pictures, **options):
    model = mmchat.load(folder, dtype="float32", **options)
    sampling = mmchat.SamplingParams(temperature=0, max_new_tokens=8)
    return model.ask("What is in the picture?", *pictures, sampling=sampling)


@pytest.fixture(scope="module")
def expected():
    return answer("tiny", DOG)


def inspected(folder):
    return CliRunner().invoke(app, ["inspect", str(folder)])


def changed_config(**changes):
    found = hub_config(SPEC.config)
    for key, value in changes.items():
        place = found["text_config"] if key in found["text_config"] else found
        place[key] = value
    return found


@pytest.mark.parametrize("head_rows", [ROWS, ROWS + 4], ids=["4.45", "newer"])
@pytest.mark.parametrize("padding", [0, 20])
def test_added_tokens_are_rows_behind_the_image_token(
    tmp_path, weights, expected, head_rows, padding
):
    """As resize_token_embeddings leaves them: three numbers, of which config.json says two."""
    rows = ROWS + 4
    more = torch.ones(rows + padding, SPEC.config.text_config.hidden_size).bfloat16()
    embedding = torch.cat((weights[EMBEDDING][: ROWS + 1], more[ROWS + 1 :]))
    head = torch.cat((weights[HEAD], more[ROWS:head_rows]))
    folder = hub_folder(tmp_path / "resized", changed_config(vocab_size=rows))
    save_file({**weights, EMBEDDING: embedding, HEAD: head}, folder / "model.safetensors")
    config = load_spec(folder / "config.json").config
    text = config.text_config
    assert (text.vocab_size, text.embedding_rows) == (head_rows, rows + padding)
    assert (config.image_token_id, config.readable_tokens) == (IMAGE, rows + padding)
    assert answer(folder, DOG) == expected
    assert inspected(folder).exit_code == 0
    document = json.dumps(params_document(load_spec(folder / "config.json")))
    (tmp_path / "ours.json").write_text(document)
    assert load_spec(tmp_path / "ours.json").config == config


def test_an_image_token_beyond_the_embedding_is_refused(tmp_path):
    folder = hub_folder(tmp_path / "model", changed_config(image_token_index=ROWS + 9))
    with pytest.raises(ParamsError, match="image_token_index: 1337 is no row of an embedding"):
        load_spec(folder / "config.json")


def test_the_text_model_alone_runs_without_pictures(tmp_path, weights):
    start = "language_model."
    text = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
    config = {**hub_config(SPEC.config)["text_config"], "model_type": "mllama_text_model"}
    folder = hub_folder(tmp_path / "text", config)
    save_file(text, folder / "model.safetensors")
    assert answer(folder) == answer("tiny", text_only=True)
    assert mmchat.load(folder).options.text_only
    with pytest.raises(UsageError, match="language model alone"):
        answer(folder, DOG)
    done = inspected(folder)
    assert done.exit_code == 0
    (folder / "model.safetensors").unlink()
    text.pop("model.norm.weight")
    save_file(text, folder / "model.safetensors")
    assert inspected(folder).exit_code == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("pytorch_model.bin", "base_model.model."),
        ("pytorch_model.bin", "module._orig_mod."),
        ("consolidated.00.pth", ""),
    ],
)
def test_wrapped_and_pickled_weights_answer_alike(tmp_path, weights, expected, name, prefix, dtype):
    config = hub_config(SPEC.config)
    del config["architectures"]
    folder = hub_folder(tmp_path / "model", config)
    torch.save({prefix + n: t.to(dtype) for n, t in weights.items()}, folder / name)
    assert answer(folder, DOG) == expected
    assert inspected(folder).exit_code == 0


def test_inspect_refuses_what_generate_refuses(tmp_path, weights):
    folder = hub_folder(tmp_path / "model")
    save_file({f"other.{n}": t for n, t in weights.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        mmchat.load(folder)
    assert inspected(folder).exit_code == 3


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m }}{% endfor %}"


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config"])
def test_a_template_is_never_run_and_that_is_said_of_one_that_is_not_known(
    tmp_path, place, monkeypatch
):
    folder = hub_folder(tmp_path / "model")
    (folder / "chat_template.json").unlink()
    content = TEMPLATE if place.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (folder / (place if "." in place else f"{place}.json")).write_text(content)
    spec = load_spec(folder / "config.json")
    assert spec.chat_format == "instruct"
    assert [notice for notice in spec.notices if "never run" in notice]
    known = spec_module._fingerprint("  " + TEMPLATE + "\r\n")
    monkeypatch.setattr(spec_module, "_KNOWN_TEMPLATES", {known})
    assert load_spec(folder / "config.json").notices == ()


def test_a_fine_tune_is_run_by_its_repository_with_its_own_tokenizer(
    tmp_path, weights, expected, monkeypatch
):
    """As lamm-mit/Cephalo-Llama-3.2-11B-Vision-Instruct-128k lies in the Hub's cache."""
    repo = "lamm-mit/Cephalo-Llama-3.2-11B-Vision-Instruct-128k"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / ("c0ffee" * 7)[:40]
    folder.mkdir(parents=True)
    hub_folder(folder)
    save_file(weights, folder / "model.safetensors")
    assert answer(repo, DOG) == expected
    assert mmchat.load(repo).spec.name == folder.name
