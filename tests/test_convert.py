import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmchat
from mmchat import convert as converting
from mmchat.catalog.find import find_model, known_params, load_params
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.convert import convert
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, DiskError, UsageError
from mmchat.hub.integrity import verify_folder
from mmchat.models.mllama.documents import meta_params
from mmchat.models.mllama.weights import iter_weights, meta_rules, shard_dims
from tests.loading.test_loader import finish, small_config, write_hf_folder
from tests.models.mllama.oracle import random_weights

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)


def weights_for(config):
    """Random weights whose tables of tile positions Meta's format can hold."""
    weights = random_weights(config)
    for rule in meta_rules(config):
        if rule.transform.name == "expand tiles":
            weights[rule.target] = rule.transform.forward([torch.randn(rule.source_shapes[0])])
    return weights


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    config = small_config()
    folder = tmp_path_factory.mktemp("models") / "random"
    return write_hf_folder(folder, config, weights_for(config))


@pytest.fixture(scope="module")
def meta_folder(tmp_path_factory, hf_folder):
    folder = tmp_path_factory.mktemp("converted") / "random-meta"
    notes = convert(find_model(hf_folder), "meta", folder)
    assert notes == ["params.json is in mmchat's own form: Meta's cannot say what this model is"]
    return folder


def weights_of(folder):
    """Name -> tensor by the Hub's names, copied out of the files."""
    source = find_model(folder)
    with open_checkpoint(folder, merge_rules=shard_dims) as opened:
        pairs = iter_weights(opened, source.params.config)
        return {name: tensor.clone() for name, tensor in pairs}


def assert_equal_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_there_and_back_every_bit_is_the_same(hf_folder, meta_folder, tmp_path):
    convert(find_model(meta_folder), "hf", tmp_path / "back")
    expected = weights_of(hf_folder)
    assert_equal_bits(weights_of(meta_folder), expected)
    assert_equal_bits(weights_of(tmp_path / "back"), expected)


def test_all_forms_give_the_same_answer(hf_folder, meta_folder, tmp_path):
    convert(find_model(meta_folder), "hf", tmp_path / "back")
    answers = [
        finish(mmchat.load(folder, device="cpu").chat().send("Hello", (), GREEDY)).output_ids
        for folder in (hf_folder, meta_folder, tmp_path / "back")
    ]
    assert answers[0] == answers[1] == answers[2]


def test_torch_reads_what_was_written(hf_folder, meta_folder):
    found = torch.load(meta_folder / "consolidated.00.pth", mmap=True, weights_only=True)
    with open_checkpoint(meta_folder) as opened:
        assert found.keys() == opened.entries.keys()
        assert all(torch.equal(found[name], opened.read(name)) for name in found)


def test_transformers_reads_what_was_written(meta_folder, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoImageProcessor, MllamaForConditionalGeneration

    folder = tmp_path / "back"
    convert(find_model(meta_folder), "hf", folder, max_shard_bytes=300_000)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.text_config.hidden_size) == ("mllama", 80)
    assert config.text_config.rope_parameters["rope_type"] == "llama3"
    assert AutoImageProcessor.from_pretrained(folder, use_fast=False).max_image_tiles == 4
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 17, 33]])
    ours = mmchat.load(folder, device="cpu", dtype="float32").runtime.model
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, ours(ids), atol=1e-4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        assert {n for n, s in index["weight_map"].items() if s == name} == load_file(
            folder / name
        ).keys()


def test_shards_stay_below_their_limit(meta_folder, tmp_path):
    convert(find_model(meta_folder), "hf", tmp_path / "back", max_shard_bytes=300_000)
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    with open_checkpoint(tmp_path / "back") as opened:
        largest = max(entry.num_bytes for entry in opened.entries.values())
    assert all(shard.stat().st_size < max(300_000, largest) + 20_000 for shard in shards)
    assert_equal_bits(weights_of(tmp_path / "back"), weights_of(meta_folder))


def test_eight_shards_of_meta_become_one_model(hf_folder, meta_folder, tmp_path):
    """Two shards as Meta splits them: rows, columns or the whole tensor in each."""
    whole = torch.load(meta_folder / "consolidated.00.pth", weights_only=True)
    folder = shutil.copytree(meta_folder, tmp_path / "two")
    for rank in range(2):
        part = {
            name: tensor if (axis := shard_dims(name)) is None else tensor.chunk(2, axis)[rank]
            for name, tensor in whole.items()
        }
        part = {name: tensor.clone() for name, tensor in part.items()}
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    convert(find_model(folder), "hf", tmp_path / "joined")
    assert_equal_bits(weights_of(tmp_path / "joined"), weights_of(hf_folder))


def test_bfloat16_stays_bfloat16(tmp_path):
    config = small_config()
    weights = {n: t.bfloat16() for n, t in weights_for(config).items()}
    folder = write_hf_folder(tmp_path / "bf16", config, weights)
    convert(find_model(folder), "meta", tmp_path / "meta")
    convert(find_model(tmp_path / "meta"), "hf", tmp_path / "hf")
    assert_equal_bits(weights_of(tmp_path / "hf"), weights)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_new_folder_has_a_record_and_no_leftovers(meta_folder):
    result = verify_folder(meta_folder)
    assert result.faults == ()
    assert set(result.files) == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert [path.name for path in meta_folder.parent.iterdir()] == [meta_folder.name]


def test_a_base_model_stays_a_base_model(hf_folder, tmp_path):
    source = find_model(hf_folder)
    base = replace(source, params=replace(source.params, chat_format="base"))
    convert(base, "meta", tmp_path / "meta")
    convert(find_model(tmp_path / "meta"), "hf", tmp_path / "hf")
    assert find_model(tmp_path / "hf").params.chat_format == "base"


@pytest.mark.parametrize("params", [p for p in known_params() if p.repo], ids=lambda p: p.name)
def test_metas_params_say_what_the_released_models_are(params, tmp_path):
    path = tmp_path / "params.json"
    path.write_text(json.dumps(meta_params(params.config)))
    assert load_params(path).config == params.config


def test_nothing_is_overwritten(hf_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        convert(find_model(hf_folder), "meta", tmp_path / "full")
    with pytest.raises(UsageError, match="in the hf format already"):
        convert(find_model(hf_folder), "hf", tmp_path / "new")
    with pytest.raises(DiskError, match="does not exist"):
        convert(find_model(hf_folder), "meta", tmp_path / "no" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["LICENSE", "USE_POLICY.md", "tokenizer.model"])
@pytest.mark.parametrize("target", ["/dev/zero", "secret.txt", "fifo"])
def test_what_lies_outside_the_folder_is_not_copied(meta_folder, tmp_path, name, target):
    source = shutil.copytree(meta_folder, tmp_path / "source")
    (tmp_path / "secret.txt").write_text("secret")
    os.mkfifo(tmp_path / "fifo")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError):
        convert(find_model(source), "hf", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "secret.txt", "source"]


def test_the_licence_comes_along_and_a_huge_one_does_not(meta_folder, tmp_path):
    source = shutil.copytree(meta_folder, tmp_path / "source")
    (source / "LICENSE").write_text("be good")
    (source / "USE_POLICY.md").symlink_to("LICENSE")
    (source / "LICENSE-texts").mkdir()
    convert(find_model(source), "hf", tmp_path / "new")
    papers = ["LICENSE", "USE_POLICY.md"]
    assert [(tmp_path / "new" / name).read_text() for name in papers] == ["be good"] * 2
    os.truncate(source / "LICENSE", 2**40)
    with pytest.raises(CheckpointError, match="at most"):
        convert(find_model(source), "hf", tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_a_tokenizer_of_another_name_gets_the_one_it_is_found_by(meta_folder, tmp_path):
    given = tmp_path / "my tokenizer (1).model"
    shutil.copyfile(meta_folder / "tokenizer.model", given)
    convert(find_model(meta_folder, tokenizer_path=given), "hf", tmp_path / "new")
    assert find_model(tmp_path / "new").tokenizer == tmp_path / "new" / "tokenizer.model"


def test_a_difference_after_writing_leaves_nothing(hf_folder, tmp_path, monkeypatch):
    write = converting.write_pth

    def faulty_disk(path, pieces, wrote):
        write(path, pieces, wrote)
        with open_checkpoint(path) as opened:
            entry = next(reversed(opened.entries.values()))
        data = bytearray(path.read_bytes())
        data[entry.offset] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(converting, "write_pth", faulty_disk)
    with pytest.raises(CheckpointError, match="was not written as it is"):
        convert(find_model(hf_folder), "meta", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def run(*args, before=""):
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", f'{before}exec "$@"', "bash", sys.executable, "-m", "mmchat", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prints_the_folder_and_the_model_answers(hf_folder, tmp_path):
    folder = tmp_path / "out"
    done = run("convert", str(hf_folder), "--to", "meta", "-o", str(folder))
    assert (done.stdout, done.returncode) == (f"{folder}\n", 0), done.stderr
    assert run("generate", str(folder), "-p", "Hi", "-n", "2").returncode == 0
    assert run("verify", str(folder)).returncode == 0


def test_a_full_disk_is_said_and_leaves_nothing(hf_folder, tmp_path):
    folder = tmp_path / "out"
    done = run("convert", str(hf_folder), "--to", "meta", "-o", str(folder), before="ulimit -f 50;")
    assert (done.stdout, done.returncode) == ("", 7), done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from mmchat.convert import convert
from mmchat.catalog.find import find_model
peaks = []
hub, meta, back = sys.argv[1:]
for target, source, folder in (("meta", hub, meta), ("hf", meta, back)):
    torch.ones(1000, 1000).t().contiguous()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert(find_model(source), target, Path(folder), max_shard_bytes=10**8)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(max(peaks) * 1024)
"""


@pytest.mark.slow
def test_memory_holds_a_tensor_and_not_the_model(tmp_path):
    text = small_config().text_config
    text = replace(text, hidden_size=640, intermediate_size=8192, num_hidden_layers=8)
    config = replace(small_config(), text_config=text)
    weights = weights_for(config)
    total = sum(tensor.nbytes for tensor in weights.values())
    largest = max(tensor.nbytes for tensor in weights.values())
    folder = write_hf_folder(tmp_path / "model", config, weights)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "meta", tmp_path / "hf"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert total > 500_000_000
    assert int(done.stdout) < 6 * largest + 50_000_000 < total / 2
