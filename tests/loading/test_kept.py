"""Rounded weights that are kept: offered, found again, never for other weights, listed, removed."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmchat.catalog import kept
from mmchat.catalog.find import find_model
from mmchat.catalog.known import data_path, known_specs
from mmchat.checkpoints import exported_folder
from mmchat.checkpoints.checkpoint import open_checkpoint
from mmchat.checkpoints.manifest import MANIFEST_NAME, FileRecord, Manifest, write_manifest
from mmchat.cli import console, model_choice
from mmchat.loading import loader
from mmchat.loading.options import LoadOptions
from mmchat.nn.linear import Linear
from mmchat.tokenizers import open_tokenizer
from tests.adapter_folders import low_rank, write_adapter
from tests.cli.conftest import Command
from tests.gguf_models import all_of, write_model
from tests.loading.test_loader import small_config, write_hf_folder
from tests.meta_checkpoint import weights_for, write_meta_folder
from tests.models.mllama.oracle import random_weights

BASE = small_config()
WEIGHTS = {name: tensor.to(torch.bfloat16) for name, tensor in random_weights(BASE).items()}
CHANGED = "language_model.model.layers.0.self_attn.q_proj", "multi_modal_projector"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_folder, "kept_folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(model_choice, "LONG_ROUNDING", 0.0)
    monkeypatch.setattr(console, "is_terminal", lambda _: False)


@pytest.fixture
def run():
    """`mmchat` as a function."""
    return Command(lambda: None)


@pytest.fixture
def base(tmp_path):
    return write_hf_folder(tmp_path / "base", BASE, WEIGHTS)


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", low_rank(WEIGHTS, CHANGED))


class Notes(list):
    """Takes what loading says."""

    def note(self, text):
        self.append(text)

    def show(self, stage):
        pass


def started(options, monkeypatch):
    """Load as a command does on a terminal; the model and what was said."""
    said = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(console, "is_terminal", lambda _: True)
        return model_choice.load(options, options.find(), said), said


def keep(options, monkeypatch, run):
    """Load, and do what is offered then; the model before and the folder."""
    model, said = started(options, monkeypatch)
    assert re.match(r"rounding took \d+ s of processor time; this keeps its result:", said[-2])
    program, *arguments = shlex.split(said[-1])
    done = run(*arguments)
    assert (program, done.exit_code) == ("mmchat", 0), done.stderr
    [folder] = done.stdout.splitlines()
    assert f"'mmchat remove {os.path.basename(folder)}' removes it" in done.stderr  # noqa: PTH119
    return model, folder


def same(left, right):
    ours, theirs = (model.runtime.model.state_dict() for model in (left, right))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def kept_of(*args, **options):
    found = LoadOptions(*args, **options).find().kept
    return found and str(found)


def test_the_offered_command_saves_the_next_start_the_rounding(run, monkeypatch):
    options = LoadOptions("tiny", quantize="int4")
    before, folder = keep(options, monkeypatch, run)
    assert folder == str(exported_folder.kept_folder() / "tiny-int4")
    assert kept_of("tiny", quantize="int4") == kept_of(None, quantize="int4") == folder

    monkeypatch.setattr(Linear, "quantize", lambda *_: pytest.fail("rounded"))
    after, said = started(options, monkeypatch)
    assert same(before, after)
    assert not any("rounding took" in line for line in said)
    assert after.spec == before.spec
    found = run("generate", "tiny", "-p", "Hi", "-t", "0", "--quantize", "int4", "--dry-run")
    assert "int4" in found.stdout

    for other in (
        {"quantize": "int8"},
        {"quantize": "int4", "quantize_keep": ("head",)},
        {"quantize": "int4", "dtype": "bfloat16"},
        {"quantize": "none"},
        {},
    ):
        assert kept_of("tiny", **other) is None, other


def test_it_is_exported_again_to_where_it_lies(run, monkeypatch):
    keep(LoadOptions("tiny", quantize="int8"), monkeypatch, run)
    refused = run("generate", "tiny-int8", "-p", "Hi", "--quantize", "int4")
    advice = "mmchat export tiny --format safetensors --keep --dtype float32 --quantize int4"
    assert refused.exit_code == 2
    assert advice in " ".join(refused.stderr.split())


@pytest.mark.slow
def test_what_samples_have_rounded_is_named_and_replaced_by_such_alone(run, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "one.txt").write_text("A dog sits in the grass, and a cat beside it.")
    command = ("export", "tiny", "--format", "safetensors", "--keep", "--quantize", "int4", "-q")
    samples = ("--calibrate", str(tmp_path / "samples"))
    folders = [run(*command, *more).stdout.strip() for more in (samples, (), samples)]
    names = [folder.rsplit("/", 1)[-1] for folder in folders]
    assert names == ["tiny-int4", "tiny-int4-2", "tiny-int4"]
    assert kept_of("tiny", quantize="int4") == folders[0]
    assert "int4, calibrated" in run("list").stdout
    assert str(tmp_path / "samples") in run("inspect", "tiny-int4").stdout.replace("\n", "")


def test_nothing_stands_in_for_files_that_cannot_be_told_apart(run, monkeypatch):
    keep(LoadOptions("tiny", quantize="int8"), monkeypatch, run)
    folder = exported_folder.kept_folder() / "tiny-int8"
    unknown = replace(exported_folder.exported_folder(folder).record, origin="")
    found = replace(exported_folder.exported_folder(folder), record=unknown)
    monkeypatch.setattr(kept, "kept_exports", lambda: [found])
    monkeypatch.setattr(kept, "origin", lambda _: "")
    assert kept_of("tiny", quantize="int8") is None


@pytest.mark.parametrize("change", ["weights", "config", "damage"])
def test_what_was_kept_of_other_weights_is_never_used(run, monkeypatch, base, change):
    _, folder = keep(LoadOptions(base, quantize="int8"), monkeypatch, run)
    assert kept_of(base, quantize="int8") == folder
    file = base / "model.safetensors"
    if change == "weights":  # of the same size, with the times set back
        before = file.stat()
        save_file({name: tensor + 1 for name, tensor in WEIGHTS.items()}, file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    elif change == "config":
        config = json.loads((base / "config.json").read_text())
        config["text_config"]["rms_norm_eps"] = 0.001
        (base / "config.json").write_text(json.dumps(config))
    else:
        written = exported_folder.kept_folder() / "base-int8" / "model.safetensors"
        written.write_bytes(written.read_bytes()[:-1])
    source = LoadOptions(base, quantize="int8").find()
    assert source.kept is None
    [notice] = source.spec.notices
    told, command = notice.split("; to keep them: ")
    assert told.startswith("'base-int8', which is kept, is damaged or was made before the model")
    assert shlex.split(command)[:3] == ["mmchat", "export", str(base)]
    assert not LoadOptions(base, quantize="int4").find().spec.notices
    if change != "damage":
        again = keep(LoadOptions(base, quantize="int8"), monkeypatch, run)
        assert again[1] == folder == kept_of(base, quantize="int8")  # in place of the old one


def test_two_models_of_one_name_are_kept_side_by_side(run, monkeypatch, base, tmp_path):
    other = tmp_path / "elsewhere" / "base"
    other.parent.mkdir()
    shutil.copytree(base, other)
    _, first = keep(LoadOptions(base, quantize="int8"), monkeypatch, run)
    _, second = keep(LoadOptions(other, quantize="int8"), monkeypatch, run)
    assert first != second
    assert kept_of(base, quantize="int8") == first
    assert kept_of(other, quantize="int8") == second


def test_a_merged_adapter_is_kept_apart_from_its_base(run, monkeypatch, base, adapter):
    plain, of_base = keep(LoadOptions(base, quantize="int8"), monkeypatch, run)
    assert kept_of(base, quantize="int8", adapter=adapter) is None
    options = LoadOptions(base, quantize="int8", adapter=adapter)
    merged, of_both = keep(options, monkeypatch, run)
    assert not same(plain, merged)
    assert (kept_of(base, quantize="int8"), kept_of(base, quantize="int8", adapter=adapter)) == (
        of_base, of_both,
    )  # fmt: skip
    assert kept_of(base, quantize="int8", adapter=f"{adapter}:0.5") is None
    again, _ = started(options, monkeypatch)
    assert same(again, merged)
    assert again.adapters == merged.adapters
    assert same(loader.load_with(again, ()), plain)  # as \adapter off does
    (adapter / "adapter_model.safetensors").touch()
    assert kept_of(base, quantize="int8", adapter=adapter) is None


def kept_and_loaded(options, monkeypatch, run):
    before, folder = keep(options, monkeypatch, run)
    source = options.find()
    after, _ = started(options, monkeypatch)
    assert str(source.kept) == folder
    assert same(before, after)
    assert before.processor.alpha == after.processor.alpha
    return after


def test_metas_files_keep_their_rule_for_alpha(run, monkeypatch, base, tmp_path):
    tokenizer = base / "tokenizer.model"
    spec = find_model(base).spec
    folder = write_meta_folder(tmp_path / "meta", spec, weights_for(BASE), tokenizer)
    model = kept_and_loaded(LoadOptions(folder, quantize="int8"), monkeypatch, run)
    assert model.processor.alpha == "drop"


def test_a_pair_in_gguf_is_kept_with_its_encoder(run, monkeypatch, tmp_path):
    tiny = data_path("assets", "tiny")
    with open_checkpoint(tiny) as files:
        weights = {name: files.read(name).clone() for name in files.entries}
    tokenizer: Any = open_tokenizer(tiny / "tokenizer.model")
    config: Any = known_specs()[0].config
    write_model(tmp_path, weights, config, tokenizer, "pair", all_of("Q8_0"))
    encoder = (tmp_path / "mmproj.gguf").rename(tmp_path / "encoder.gguf")
    options = LoadOptions(tmp_path / "model.gguf", vision_tower=encoder, quantize="int4")
    kept_and_loaded(options, monkeypatch, run)
    encoder.touch()
    assert options.find().kept is None


def test_what_is_kept_is_listed_named_and_removed(run, monkeypatch):
    _, folder = keep(LoadOptions("tiny", quantize="int8"), monkeypatch, run)
    listed = json.loads(run("list", "--json").stdout)
    [found] = [model for model in listed if model["name"] == "tiny-int8"]
    assert (found["path"], found["formats"], found["state"]) == (folder, ["int8"], "present")
    assert found["bytes"] > 8_000_000
    assert run("where", "tiny-int8").stdout == f"{folder}\n"
    question = "-p", "What colour is the sky?", "-t", "0"
    by_name = run("generate", "tiny-int8", *question)
    assert (by_name.exit_code, by_name.stdout) == (
        0, run("generate", "tiny", "--quantize", "int8", *question).stdout,
    )  # fmt: skip
    done = run("remove", "tiny-int8", "--yes")
    assert (done.exit_code, list(kept.kept_exports())) == (0, [])
    assert kept_of("tiny", quantize="int8") is None


def test_what_is_kept_goes_with_its_model(run, monkeypatch, base, adapter):
    _, of_base = keep(LoadOptions(base, quantize="int8"), monkeypatch, run)
    _, of_both = keep(LoadOptions(base, quantize="int8", adapter=adapter), monkeypatch, run)
    _, other = keep(LoadOptions("tiny", quantize="int8"), monkeypatch, run)
    written = {path.name: FileRecord(path.stat().st_size, "0" * 64, None, True)
               for folder in (base, adapter) for path in folder.iterdir()}  # fmt: skip
    for folder in (adapter, base):
        own = {path.name: written[path.name] for path in folder.iterdir()}
        write_manifest(folder / MANIFEST_NAME, Manifest(own, repo="someone/else"))
    assert run("remove", str(adapter), "-y").exit_code == 0
    assert [str(found.path) for found in kept.kept_exports()] == [of_base, other]
    assert not os.path.exists(of_both)  # noqa: PTH110
    done = run("remove", str(base), "-y")
    assert "  base-int8/model.safetensors\n" in done.stderr
    assert [str(found.path) for found in kept.kept_exports()] == [other]
    assert (done.exit_code, base.exists()) == (0, False)


def test_a_model_is_named_from_any_folder(run, monkeypatch, base):
    monkeypatch.chdir(base.parent)
    command = ("export", "base", "--format", "safetensors", "--keep", "--quantize", "int8", "-q")
    folder = run(*command).stdout.strip()
    assert exported_folder.exported_folder(Path(folder)).source == str(base)
    monkeypatch.chdir("/")
    assert kept_of(base, quantize="int8") == folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("--format", "safetensors", "--keep"),
        ("--keep", "--quantize", "int8"),
        ("--format", "safetensors", "--keep", "--quantize", "int8", "-o", "out"),
    ],
)
def test_what_cannot_be_kept_is_said(run, arguments):
    done = run("export", "tiny", *arguments)
    assert (done.exit_code, done.stderr) == (
        2,
        "mmchat: error: --keep is for --format safetensors --quantize SCHEME, without -o\n",
    )
    assert not exported_folder.kept_folder().exists()


@pytest.mark.parametrize("reason", ["Not a directory", "Permission denied"])
def test_a_cache_that_cannot_be_written_is_said_with_what_helps(run, monkeypatch, tmp_path, reason):
    if reason == "Not a directory":
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(exported_folder, "kept_folder", lambda: tmp_path / "file" / "models")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    place = exported_folder.kept_folder()
    done = run("export", "tiny", "--format", "safetensors", "--keep", "--quantize", "int8")
    advice = "give -o DIR in its place, and DIR as the model"
    said = f"mmchat: error: --keep cannot write to '{place}': {reason}; {advice}\n"
    assert (done.exit_code, done.stderr) == (7, said)
