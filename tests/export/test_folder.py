"""What `mmchat export` writes, overwrites and refuses; the programs are not compiled here."""

import json
import os
from dataclasses import replace

import pytest
import torch

import mmchat
from mmchat.checkpoints.exported_folder import PACKAGE_NAME
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError, DiskError, ExportError, UsageError
from mmchat.export import ExportPlan, export_model
from mmchat.export import check as checking
from mmchat.export.check import check_same
from mmchat.hub.integrity import verify_folder
from mmchat.loading import programs as opening
from mmchat.loading.options import LoadOptions
from tests.loading.test_loader import finish

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)


@pytest.fixture
def folder(tmp_path):
    """The built-in model's weights in bfloat16."""
    out = tmp_path / "out"
    export_model(ExportPlan(LoadOptions(dtype="bfloat16"), out, "safetensors"))
    return out


@pytest.fixture
def programs(folder):
    """The same folder, claiming to hold compiled programs; they are never loaded."""
    (folder / PACKAGE_NAME).write_bytes(b"PK programs")
    return claim(folder, format="aoti", programs=("decode",), max_seq_len=512)


def plan_of(folder, format="aoti", max_images=None, **options):
    return ExportPlan(LoadOptions(**options), folder, format, max_images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 63}, "--max-seq-len 63 is too short .* give 64 positions or more"),
        ({"format": "safetensors", "max_seq_len": 64}, "safetensors takes any length"),
        ({"max_images": 0}, "--max-images 0 is out of range: .* 1 to 16 pictures; give a number"),
        ({"max_images": 17}, "--max-images 17 is out of range"),
        ({"format": "safetensors", "max_images": 16}, "safetensors takes any number of pictures"),
        ({"format": "hf", "max_images": 2}, "--max-images 2 is for aoti and executorch; hf takes"),
        ({"quantize_keep": ("head",)}, "--quantize-keep head keeps nothing without --quantize"),
        ({"quantize": "int3"}, "unknown quantisation scheme 'int3'"),
        ({"kv": "int8"}, "--kv int8 is how a model keeps what it reads, .*; leave it out"),
    ],
)
def test_a_plan_that_no_export_follows_cannot_be_made(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        plan_of(tmp_path / "out", **options)


def claim(folder, **changes):
    """Write the record anew with `changes`."""
    manifest = read_manifest(folder / MANIFEST_NAME)
    files = {
        path.name: FileRecord(path.stat().st_size, sha256_of(path), None, True)
        for path in folder.iterdir()
        if path.name != MANIFEST_NAME
    }
    write_manifest(
        folder / MANIFEST_NAME,
        replace(manifest, files=files, export=replace(manifest.export, **changes)),
    )
    return folder


def test_programs_keep_keys_and_values_in_one_format(programs):
    words = "holds compiled programs, which keep keys and values in bfloat16; leave out --kv"
    with pytest.raises(UsageError, match=words):
        mmchat.load(programs, kv="int8")


def test_weights_are_stored_once_in_the_dtype_and_aligned(folder):
    header_bytes = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + header_bytes])
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    begins = [entry["data_offsets"][0] for entry in header.values()]
    large = [n for n, entry in header.items() if len(entry["shape"]) > 1]
    assert all(header[name]["data_offsets"][0] % 64 == 0 for name in large)
    assert len(set(begins)) == len(begins)


def test_the_folder_runs_alone_in_its_dtype(folder):
    model = mmchat.load(folder, device="cpu")
    assert model.dtype == torch.bfloat16
    original = mmchat.load(None, device="cpu", dtype="bfloat16")
    answers = [finish(m.chat().send("Hello", (), GREEDY)).output_ids for m in (model, original)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("scheme", "keep"), [("int8", ()), ("int4", ()), ("int4-g32", ("head",))])
def test_quantised_weights_are_stored_as_they_are_used(tmp_path, scheme, keep):
    out = tmp_path / "out"
    plan = ExportPlan(LoadOptions(quantize=scheme, quantize_keep=keep), out, "safetensors")
    export_model(plan)
    model = mmchat.load(out, device="cpu")
    original = mmchat.load(None, device="cpu", quantize=scheme, quantize_keep=keep)
    stored, expected = (m.runtime.model.state_dict() for m in (model, original))
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert model.options.quantize == scheme
    answers = [finish(m.chat().send("Hello", (), GREEDY)).output_ids for m in (model, original)]
    assert answers[0] == answers[1]
    refused(out, UsageError, f"with --quantize {scheme}", quantize="fp8")
    again = tmp_path / "again"
    export_model(ExportPlan(LoadOptions(out), again, "safetensors"))
    assert sha256_of(again / "model.safetensors") == sha256_of(out / "model.safetensors")


def test_weights_that_do_not_fit_are_all_named(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    tensors["stranger"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    claim(folder)
    said = "1 missing: 'language_model.lm_head.weight'; 1 unexpected: 'stranger'.*; export it again"
    with pytest.raises(CheckpointError, match=said):
        mmchat.load(folder)


@pytest.mark.parametrize(
    ("quantize", "ending", "wrong", "message"),
    [
        ("int8", "weight_scale", torch.bfloat16, r"expected float32, found \[\d+\] bfloat16"),
        ("int4", "weight_zero", torch.float32, "expected bfloat16, found .* float32"),
        ("int4", "gate_up_proj.weight", torch.int8, "expected uint8, found .* int8"),
        ("none", "layernorm_pre.weight", torch.float16, "expected float32, found .* float16"),
    ],
)
def test_what_is_stored_in_another_dtype_is_refused(tmp_path, quantize, ending, wrong, message):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "out"
    plan = ExportPlan(LoadOptions(dtype="float32", quantize=quantize), folder, "safetensors")
    export_model(plan)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = tensors[name].to(wrong)
    save_file(tensors, folder / "model.safetensors")
    claim(folder)
    with pytest.raises(CheckpointError, match=message):
        mmchat.load(folder)


def test_text_alone_needs_no_vision_weights(folder):
    model = mmchat.load(folder, text_only=True)
    assert finish(model.chat().send("Hello", (), GREEDY)).output_ids


@pytest.mark.parametrize("kind", ["folder", "programs"])
def test_loading_says_how_far_it_is(kind, request):
    told = []
    mmchat.load(request.getfixturevalue(kind), progress=lambda *step: told.append(step))
    count = len(told)
    assert told == [("weights", done, count) for done in range(1, count + 1)]
    assert count > 100


def test_programs_are_not_exported_again(programs, tmp_path):
    with pytest.raises(UsageError, match="holds programs; export 'tiny' instead"):
        export_model(ExportPlan(LoadOptions(programs), tmp_path / "again"))


@pytest.mark.parametrize(
    ("format", "other"),
    [
        ("safetensors", {"quantize": "int8"}),
        ("safetensors", {"dtype": "float32"}),
        ("executorch", {}),
    ],
)
def test_weights_that_stay_as_they_were_are_exported_from_their_own_source(
    folder, tmp_path, format, other
):
    told = "holds weights in bfloat16 with --quantize none, which stay so; export 'tiny' instead"
    with pytest.raises(UsageError, match=told):
        export_model(ExportPlan(LoadOptions(folder, **other), tmp_path / "again", format))


def test_a_folder_of_the_hub_is_made_of_them_in_any_dtype(folder, tmp_path):
    plan = ExportPlan(LoadOptions(folder, dtype="float32"), tmp_path / "hub", "hf")
    assert export_model(plan).dtype is None
    assert read_manifest(tmp_path / "hub" / MANIFEST_NAME).source == str(folder)


def test_an_export_that_is_cut_off_is_to_be_exported_again(folder):
    again = f"; export it again: mmchat export tiny --format safetensors -o {folder} .* --force$"
    for size in (100_000, 100, 0):
        os.truncate(folder / "model.safetensors", size)
        with pytest.raises(CheckpointError, match=again) as refused:
            mmchat.load(folder)
        assert "download" not in str(refused.value)


def test_the_comparison_finds_a_model_that_is_not_the_same():
    model = mmchat.load(None, device="cpu", dtype="float32")
    assert check_same(model, model) == 0
    other = mmchat.load(None, device="cpu", dtype="float32")
    gate = other.runtime.model.language_model.model.layers[1].cross_attn_attn_gate
    gate.data.neg_()
    with pytest.raises(ExportError, match="differ from the model by"):
        check_same(model, other)
    gate.data.fill_(float("nan"))
    with pytest.raises(ExportError, match="differ from the model by nan"):
        check_same(model, other)


def test_the_comparison_asks_about_as_many_pictures_as_the_export_may_see():
    model = mmchat.load(None, device="cpu")
    for most in (1, 2, 16):
        seen = [len(prompt.media) for prompt in checking._prompts(model, most)]
        assert seen == [0, 1, min(2, most)]


def test_the_record_names_everything_and_verifies(folder):
    manifest = read_manifest(folder / MANIFEST_NAME)
    assert {*manifest.files, MANIFEST_NAME} == {path.name for path in folder.iterdir()}
    assert manifest.export.dtype == "bfloat16"
    assert not verify_folder(folder).faults


def test_an_export_replaces_its_own_folder(folder):
    export_model(ExportPlan(LoadOptions(dtype="float32"), folder, "safetensors"))
    assert read_manifest(folder / MANIFEST_NAME).export.dtype == "float32"


def test_what_export_did_not_write_needs_force(folder):
    (folder / "notes.txt").write_text("mine")
    plan = ExportPlan(LoadOptions(), folder, "safetensors")
    with pytest.raises(UsageError, match=r"did not write, or what was changed since; .* --force"):
        export_model(plan)
    assert (folder / "notes.txt").read_text() == "mine"
    export_model(replace(plan, force=True))
    assert not (folder / "notes.txt").exists()


def test_not_even_force_replaces_home_or_the_model_itself(folder, monkeypatch, tmp_path):
    plan = ExportPlan(LoadOptions(folder), folder, "safetensors", force=True)
    with pytest.raises(UsageError, match="is not replaced"):
        export_model(plan)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("mine")
    samples = ExportPlan(
        LoadOptions(quantize="int4"), tmp_path / "own", "safetensors", force=True,
        calibrate=tmp_path / "own",
    )  # fmt: skip
    with pytest.raises(UsageError, match="is not replaced"):
        export_model(samples)
    assert (tmp_path / "own" / "a.txt").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "inner").mkdir(parents=True)
    with pytest.raises(UsageError, match="is not replaced"):
        export_model(ExportPlan(LoadOptions(), tmp_path / "home", "safetensors", force=True))


@pytest.mark.parametrize(
    "step", ["loaded.write_safetensors", "loaded.write_json", "write_manifest"]
)
def test_a_failure_leaves_the_old_folder(folder, monkeypatch, step):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(f"mmchat.export.{step}", fail)
    with pytest.raises(ZeroDivisionError):
        export_model(ExportPlan(LoadOptions(dtype="float32"), folder, "safetensors"))
    assert read_manifest(folder / MANIFEST_NAME).export.dtype == "bfloat16"
    assert not verify_folder(folder).faults
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_missing_parent_and_a_file_in_the_way_are_refused(tmp_path):
    with pytest.raises(DiskError, match="does not exist"):
        export_model(ExportPlan(LoadOptions(), tmp_path / "no" / "out", "safetensors"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is no folder"):
        export_model(ExportPlan(LoadOptions(), tmp_path / "file", "safetensors", force=True))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"needs .* bytes more in"):
        export_model(ExportPlan(LoadOptions(), tmp_path / "out", "safetensors"))
    assert not list(tmp_path.iterdir())


# Folders that say they hold programs


def refused(folder, error, match, **options):
    with pytest.raises(error, match=match) as caught:
        mmchat.load(folder, **options)
    assert "\n" not in str(caught.value)
    assert "mmchat export" in str(caught.value), str(caught.value)


def test_programs_of_another_torch_are_refused(programs):
    claim(programs, torch="2.3.0")
    refused(programs, ExportError, "with torch 2.3.0, and this is torch")


def test_programs_for_another_processor_are_refused(programs):
    claim(programs, processor="riscv64 AVX2")
    refused(programs, ExportError, "for a processor with riscv64 AVX2")


@pytest.mark.parametrize(
    ("made_for", "here", "runs"),
    [
        ("x86_64 AVX2", "x86_64 AVX2", True),
        ("x86_64 AVX2", "x86_64 AVX512", True),
        ("x86_64 AVX512", "x86_64 AVX2", False),
        ("x86_64 DEFAULT", "aarch64 DEFAULT", False),
        ("aarch64 SVE256", "aarch64 SVE256", True),
        ("aarch64 SVE256", "aarch64 DEFAULT", False),
    ],
)
def test_code_runs_on_processors_that_have_its_instructions(made_for, here, runs):
    assert opening._runs(made_for, here) is runs


def test_programs_for_another_device_are_refused(programs):
    claim(programs, device="mps")
    refused(programs, ExportError, "exported for mps, not cpu", device="cpu")


def test_options_that_it_was_not_exported_for_are_refused(programs):
    refused(programs, UsageError, "for 512 positions, not 1000; .* --max-seq-len", max_seq_len=1000)
    refused(programs, UsageError, "exported in bfloat16, not float32", dtype="float32")


def test_the_command_to_export_again_keeps_the_other_options(programs):
    claim(programs, scheme="int8", keep=("vision",), max_images=2)
    with pytest.raises(UsageError) as raised:
        mmchat.load(programs, max_seq_len=1000)
    command = str(raised.value).partition("export again: ")[2]
    options = "--quantize-keep vision --dtype bfloat16 --quantize int8 --max-seq-len 1000"
    assert command.endswith(f" --format aoti -o {programs} {options} --max-images 2")


def test_the_command_to_export_again_has_the_parts_that_were_asked_for(programs):
    claim(programs, scheme="int8", keep=("vision",))
    with pytest.raises(UsageError, match="--quantize-keep head --dtype bfloat16 --quantize int4"):
        mmchat.load(programs, quantize="int4", quantize_keep=("head",))


def test_a_missing_file_is_named(programs):
    (programs / "tokenizer.model").unlink()
    refused(programs, CheckpointError, "tokenizer.model' is missing")


@pytest.mark.parametrize("name", [PACKAGE_NAME, "params.json", "tokenizer.model"])
def test_a_flipped_bit_is_found_before_anything_is_run(programs, name):
    data = bytearray((programs / name).read_bytes())
    data[len(data) // 2] ^= 1
    if name == "params.json":
        data = data.replace(b"Built-in", b"Built_in")
    (programs / name).write_bytes(data)
    with pytest.raises((CheckpointError, mmchat.MmchatError), match=name):
        mmchat.load(programs)


def test_a_flipped_bit_in_the_record_is_found(programs):
    path = programs / MANIFEST_NAME
    data = bytearray(path.read_bytes())
    position = data.index(b'"sha256": "') + 12
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"record is damaged; .* export again"):
        mmchat.load(programs)


def test_weights_of_another_size_are_refused(programs):
    with (programs / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(programs, CheckpointError, "model.safetensors' has .* bytes, .* are recorded")


def test_programs_without_a_record_are_refused(programs):
    (programs / MANIFEST_NAME).unlink()
    refused(programs, CheckpointError, "exported programs but no mmchat-manifest.json")


def test_a_damaged_package_is_one_line(programs):
    model = mmchat.load(programs)
    with pytest.raises(ExportError, match="cannot be loaded") as caught:
        finish(model.chat().send("Hello", (), GREEDY))
    assert "\n" not in str(caught.value)
