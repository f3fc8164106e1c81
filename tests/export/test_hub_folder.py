"""`mmchat export --format hf`: Meta's files, or any weights not quantised, as on the Hub."""

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
from mmchat.catalog.find import find_model, load_spec
from mmchat.catalog.known import known_specs
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, read_manifest, write_manifest
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, DeviceError, DiskError, MmchatError, UsageError
from mmchat.export import ExportPlan, export_model, hub_folder
from mmchat.hub.integrity import verify_folder
from mmchat.loading.options import LoadOptions
from mmchat.models.base import Batch
from mmchat.models.mllama.build import MllamaBuild
from mmchat.models.mllama.meta_format import shard_dims
from tests.loading.test_loader import finish, small_config, write_hf_folder
from tests.meta_checkpoint import meta_params, weights_for, write_meta_folder

BUILD = MllamaBuild()

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)


def export_hf(source, folder, *, max_shard_bytes=None, force=False, **options):
    model = LoadOptions(source, **options)
    plan = ExportPlan(model, folder, "hf", max_shard_bytes=max_shard_bytes, force=force)
    export_model(plan)
    return folder


@pytest.fixture(scope="module")
def weights():
    return weights_for(small_config())


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, weights):
    return write_hf_folder(tmp_path_factory.mktemp("models") / "random", small_config(), weights)


def write_meta(folder, hf_folder, weights, **options):
    source = find_model(hf_folder)
    return write_meta_folder(folder, source.spec, weights, source.tokenizer_file(), **options)


@pytest.fixture(scope="module")
def meta_folder(tmp_path_factory, hf_folder, weights):
    return write_meta(tmp_path_factory.mktemp("models") / "meta", hf_folder, weights)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, meta_folder):
    return export_hf(meta_folder, tmp_path_factory.mktemp("exports") / "hf")


def weights_of(folder):
    """Name -> tensor by the Hub's names, copied out of the files."""
    source = find_model(folder)
    with open_checkpoint(folder, merge_rules=shard_dims) as opened:
        pairs = BUILD.iter_weights(opened, source.spec.config)
        return {name: tensor.clone() for name, tensor in pairs}


def assert_equal_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_from_metas_files_every_bit_is_the_same(weights, meta_folder, exported):
    assert_equal_bits(weights_of(meta_folder), weights)
    assert_equal_bits(weights_of(exported), weights)


def test_all_forms_give_the_same_answer(hf_folder, meta_folder, exported):
    answers = [
        finish(mmchat.load(folder, device="cpu").chat().send("Hello", (), GREEDY)).output_ids
        for folder in (hf_folder, meta_folder, exported)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_transformers_reads_what_was_written(meta_folder, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoImageProcessor, MllamaForConditionalGeneration

    folder = export_hf(meta_folder, tmp_path / "hf", max_shard_bytes=300_000)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.text_config.hidden_size) == ("mllama", 80)
    assert config.text_config.rope_parameters["rope_type"] == "llama3"
    assert AutoImageProcessor.from_pretrained(folder, use_fast=False).max_image_tiles == 4
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 17, 33]])
    ours = mmchat.load(folder, device="cpu", dtype="float32").runtime.model
    with torch.inference_mode():
        got = ours(Batch.all_of(ids[0], 0), ours.new_cache(1, 8))
        assert torch.allclose(model(ids).logits[0], got, atol=1e-4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        assert {n for n, s in index["weight_map"].items() if s == name} == load_file(
            folder / name
        ).keys()


def test_shards_stay_below_their_limit(weights, meta_folder, tmp_path):
    folder = export_hf(meta_folder, tmp_path / "hf", max_shard_bytes=300_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    with open_checkpoint(folder) as opened:
        largest = max(entry.num_bytes for entry in opened.entries.values())
    assert all(shard.stat().st_size < max(300_000, largest) + 20_000 for shard in shards)
    assert_equal_bits(weights_of(folder), weights)


def test_shards_of_meta_become_one_model(hf_folder, weights, tmp_path):
    """Two shards as Meta splits them: rows, columns or the whole tensor in each."""
    folder = write_meta(tmp_path / "two", hf_folder, weights, shards=2)
    assert len(list(folder.glob("consolidated.*.pth"))) == 2
    assert verify_folder(folder).faults == ()
    assert_equal_bits(weights_of(export_hf(folder, tmp_path / "joined")), weights)


def test_bfloat16_stays_bfloat16(hf_folder, weights, tmp_path):
    small = {name: tensor.bfloat16() for name, tensor in weights.items()}
    meta = write_meta(tmp_path / "meta", hf_folder, small)
    folder = export_hf(meta, tmp_path / "hf")
    assert_equal_bits(weights_of(folder), small)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("source", ["hf_folder", "meta_folder"])
def test_another_dtype_is_that_of_every_tensor(source, weights, tmp_path, request):
    folder = export_hf(request.getfixturevalue(source), tmp_path / "hf", dtype="bf16")
    assert_equal_bits(weights_of(folder), {n: t.bfloat16() for n, t in weights.items()})
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_weights_that_export_wrote_are_a_checkpoint_too(hf_folder, weights, tmp_path):
    mapped = tmp_path / "mapped"
    export_model(
        ExportPlan(LoadOptions(hf_folder, device="cpu", dtype="float32"), mapped, "safetensors")
    )
    assert_equal_bits(weights_of(export_hf(mapped, tmp_path / "hf")), weights)


def test_weights_that_are_quantised_or_joined_are_not_exported_again(hf_folder, tmp_path):
    small = tmp_path / "small"
    export_model(
        ExportPlan(LoadOptions(hf_folder, device="cpu", quantize="int8"), small, "safetensors")
    )
    with pytest.raises(UsageError, match=r"holds weights in int8, .*; export '.*random' instead"):
        export_hf(small, tmp_path / "hf")
    record = read_manifest(small / MANIFEST_NAME)
    export = replace(record.export, scheme="none", device="cuda")
    write_manifest(small / MANIFEST_NAME, replace(record, export=export))
    with pytest.raises(UsageError, match="weights that are joined for cuda; export"):
        export_hf(small, tmp_path / "hf")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize": "int4"}, UsageError, "use --format safetensors --quantize int4, or leave"),
        ({"device": "cuda"}, UsageError, "runs nothing, not on cuda either; leave out --device"),
        ({"max_seq_len": 64}, UsageError, "hf takes any length, so leave it out"),
        ({"dtype": "int8"}, DeviceError, "unknown dtype 'int8'; use auto, bfloat16"),
    ],
)
def test_what_a_checkpoint_of_the_hub_has_no_form_for_is_refused(
    hf_folder, tmp_path, options, error, message
):
    with pytest.raises(error, match=message):
        export_hf(hf_folder, tmp_path / "hf", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        *((w, "did you mean --format hf\\?") for w in ("convert", "huggingface", "Hugging-Face")),
        ("safetensor", "did you mean --format safetensors\\?"),
        ("gguf", "use one of aoti, executorch, safetensors, hf"),
    ],
)
def test_a_format_in_other_words_is_named(tmp_path, word, message):
    with pytest.raises(UsageError, match=f"no export has the format '{word}'; {message}"):
        ExportPlan(LoadOptions(), tmp_path / "out", word)


def test_the_size_of_a_shard_is_for_the_hub_alone(tmp_path):
    with pytest.raises(UsageError, match="--max-shard-size is for hf; aoti keeps the weights in"):
        ExportPlan(LoadOptions(), tmp_path / "out", max_shard_bytes=1)


def test_the_new_folder_has_a_record_and_no_leftovers(exported):
    result = verify_folder(exported)
    assert result.faults == ()
    assert {*result.files} == {path.name for path in exported.iterdir()} - {MANIFEST_NAME}
    assert {"config.json", "generation_config.json", "preprocessor_config.json"} < {*result.files}
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_the_new_folder_is_loaded_as_any_checkpoint(exported):
    """No record of an export ties it to a dtype or a scheme."""
    assert read_manifest(exported / MANIFEST_NAME).export is None
    model = mmchat.load(exported, device="cpu", dtype="bfloat16", quantize="int8")
    assert finish(model.chat().send("Hello", (), GREEDY)).output_ids


def test_a_base_model_stays_a_base_model(hf_folder, weights, tmp_path):
    source = find_model(hf_folder)
    spec = replace(source.spec, chat_format="base")
    meta = write_meta_folder(tmp_path / "meta", spec, weights, source.tokenizer_file())
    assert find_model(export_hf(meta, tmp_path / "hf")).spec.chat_format == "base"


RELEASED = [p for p in known_specs() if p.repo and p.model_type == "mllama"]


@pytest.mark.parametrize("spec", RELEASED, ids=lambda p: p.name)
def test_metas_params_say_what_the_released_models_are(spec, tmp_path):
    path = tmp_path / "params.json"
    path.write_text(json.dumps(meta_params(spec.config)))
    assert load_spec(path).config == spec.config


def test_its_own_folder_is_replaced_and_nothing_else(hf_folder, tmp_path):
    folder = export_hf(hf_folder, tmp_path / "hf")
    export_hf(hf_folder, folder, dtype="float16")
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.float16}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"did not write, or what was changed since; .* --force"):
        export_hf(hf_folder, folder)
    with pytest.raises(UsageError, match="is not replaced"):
        export_hf(folder, folder, force=True)
    with pytest.raises(DiskError, match="does not exist"):
        export_hf(hf_folder, tmp_path / "no" / "new")
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", ["same size", "shorter", "a folder", "of Meta"])
def test_a_folder_of_ours_that_somebody_changed_is_not_replaced(hf_folder, tmp_path, kind):
    folder = export_hf(hf_folder, tmp_path / "hf")
    weights = folder / "model.safetensors"
    record = folder / MANIFEST_NAME
    if kind == "same size":
        weights.write_bytes(weights.read_bytes()[::-1])
        os.utime(weights, ns=(0, record.stat().st_mtime_ns + 1))
    elif kind == "shorter":
        weights.write_bytes(b"mine")
        os.utime(weights, ns=(0, 0))
    elif kind == "a folder":
        weights.unlink()
        weights.mkdir()
        os.utime(weights, ns=(0, 0))
    else:  # as a folder of other files that mmchat recorded
        manifest = read_manifest(record)
        (folder / "config.json").unlink()
        files = {name: file for name, file in manifest.files.items() if name != "config.json"}
        write_manifest(record, replace(manifest, files=files))
    with pytest.raises(UsageError, match="or what was changed since"):
        export_hf(hf_folder, folder)
    assert weights.exists()
    assert export_hf(hf_folder, folder, force=True)


def test_a_folder_that_was_downloaded_is_not_replaced(hf_folder, tmp_path):
    folder = export_hf(hf_folder, tmp_path / "hf")
    record = read_manifest(folder / MANIFEST_NAME)
    write_manifest(folder / MANIFEST_NAME, replace(record, repo="owner/name", source=None))
    with pytest.raises(UsageError, match="did not write"):
        export_hf(hf_folder, folder)


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
        export_hf(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "secret.txt", "source"]


def test_the_licence_comes_along_and_a_huge_one_does_not(meta_folder, tmp_path):
    source = shutil.copytree(meta_folder, tmp_path / "source")
    (source / "LICENSE").write_text("be good")
    (source / "USE_POLICY.md").symlink_to("LICENSE")
    (source / "LICENSE-texts").mkdir()
    folder = export_hf(source, tmp_path / "new")
    papers = ["LICENSE", "USE_POLICY.md"]
    assert [(folder / name).read_text() for name in papers] == ["be good"] * 2
    os.truncate(source / "LICENSE", 2**40)
    with pytest.raises(CheckpointError, match="at most"):
        export_hf(source, tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_a_tokenizer_of_another_name_gets_the_one_it_is_found_by(meta_folder, tmp_path):
    given = tmp_path / "my tokenizer (1).model"
    shutil.copyfile(meta_folder / "tokenizer.model", given)
    folder = export_hf(meta_folder, tmp_path / "new", tokenizer_path=given)
    assert find_model(folder).tokenizer == folder / "tokenizer.model"


def test_a_tokenizer_that_is_none_is_refused_before_the_weights_are_written(
    meta_folder, tmp_path, monkeypatch
):
    given = tmp_path / "tokenizer.model"
    given.write_text("no tokens")
    monkeypatch.setattr(hub_folder, "write_safetensors", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        export_hf(meta_folder, tmp_path / "new", tokenizer_path=given)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_difference_after_writing_leaves_nothing(meta_folder, tmp_path, monkeypatch):
    write = hub_folder.write_safetensors

    def faulty_disk(folder, *arguments):
        write(folder, *arguments)
        path = folder / "model.safetensors"
        with open_checkpoint(path) as opened:
            entry = next(reversed(opened.entries.values()))
        data = bytearray(path.read_bytes())
        data[entry.offset] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(hub_folder, "write_safetensors", faulty_disk)
    with pytest.raises(CheckpointError, match="was not written as it is"):
        export_hf(meta_folder, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_the_params_are_refused_before_anything_is_written(
    meta_folder, weights, tmp_path
):
    source = shutil.copytree(meta_folder, tmp_path / "source")
    torch.save({"stranger": torch.ones(2)}, source / "consolidated.00.pth")
    with pytest.raises(MmchatError, match="another kind of model"):
        export_hf(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def run(*args, before=""):
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", f'{before}exec "$@"', "bash", sys.executable, "-m", "mmchat", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_the_command_prints_the_folder_and_the_model_answers(meta_folder, tmp_path):
    folder = tmp_path / "out"
    done = run("export", str(meta_folder), "--format", "hf", "-o", str(folder))
    assert (done.stdout, done.returncode) == (f"{folder}\n", 0), done.stderr
    assert run("generate", str(folder), "-p", "Hi", "-n", "2").returncode == 0
    assert run("verify", str(folder)).returncode == 0


@pytest.mark.process
def test_a_full_disk_is_said_and_leaves_nothing(meta_folder, tmp_path):
    folder = tmp_path / "out"
    command = ("export", str(meta_folder), "--format", "hf", "-o", str(folder))
    done = run(*command, before="ulimit -f 50;")
    assert (done.stdout, done.returncode) == ("", 7), done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions
from mmchat.models.base import Batch
from mmchat.models.base import Batch
import mmchat.loading.programs
torch.ones(1000, 1000).t().contiguous().bfloat16()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, folder, dtype = sys.argv[1:]
options = LoadOptions(source, dtype=dtype)
export_model(ExportPlan(options, Path(folder), "hf", max_shard_bytes=10**8))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_holds_a_tensor_and_not_the_model(tmp_path):
    text = small_config().text_config
    text = replace(text, hidden_size=640, intermediate_size=8192, num_hidden_layers=8)
    config = replace(small_config(), text_config=text)
    weights = weights_for(config)
    total = sum(tensor.nbytes for tensor in weights.values())
    largest = max(tensor.nbytes for tensor in weights.values())
    hub = write_hf_folder(tmp_path / "hub", config, weights)
    meta = write_meta(tmp_path / "meta", hub, weights)
    del weights
    assert total > 500_000_000
    for source, dtype in ((meta, "auto"), (meta, "bfloat16"), (hub, "auto")):
        command = [sys.executable, "-c", MEASURE, source, tmp_path / "new", dtype]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 6 * largest + 50_000_000 < total / 2, (source, dtype)
