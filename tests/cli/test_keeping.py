import fcntl
import hashlib
import json
import os
import shlex
import shutil
from dataclasses import replace

import pytest

from mmchat.catalog.known import data_path
from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    write_manifest,
)
from mmchat.hub.holdings import remove, repo_removal
from tests.cli.hub_fixtures import COMMIT, FILES, REPO, USUAL, WEIGHTS

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]  # long: begun early


def flip(path, bit=12_345):
    """Change one bit of a file, behind every link."""
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.resolve().write_bytes(data)


def listed(machine, name=REPO):
    models = json.loads(machine.run("list", "--json").stdout)
    return next((model for model in models if model["name"] == name), None)


# list


def test_list_shows_what_was_downloaded(machine):
    assert listed(machine) is None
    machine.run("download", REPO)
    found = listed(machine)
    assert (found["state"], found["formats"]) == ("present", ["safetensors"])
    assert (found["path"], found["commit"]) == (str(machine.snapshot), COMMIT)
    assert found["bytes"] == sum(map(len, USUAL.values()))
    machine.run("download", REPO, "--format", "original")
    assert listed(machine)["formats"] == ["original", "safetensors"]


def test_a_known_model_is_listed_by_its_name(machine):
    machine.hub.repo = "meta-llama/Llama-3.2-11B-Vision"
    machine.run("download", "llama3.2-11b-base")
    found = listed(machine, "Llama-3.2-11B-Vision")
    assert (found["state"], found["path"]) == ("present", str(machine.snapshot))
    assert listed(machine, "meta-llama/Llama-3.2-11B-Vision") is None


def test_a_snapshot_that_lacks_a_file_or_its_record_is_not_shown_as_whole(machine):
    machine.run("download", REPO)
    (machine.snapshot / "config.json").unlink()
    assert listed(machine)["state"] == "incomplete"
    machine.run("download", REPO)
    assert listed(machine)["state"] == "present"
    (machine.root / "mmchat" / f"{COMMIT}.json").unlink()
    assert listed(machine)["state"] == "incomplete"  # its weights here are no safetensors


# where


def test_where_prints_the_folder(machine):
    absent = machine.run("where", "llama3.2-11B")
    assert (absent.stdout, absent.exit_code) == ("", 3)
    assert "mmchat download" in absent.stderr
    machine.run("download", REPO)
    assert machine.run("where", REPO).stdout == f"{machine.snapshot}\n"
    assert json.loads(machine.run("where", REPO, "--json").stdout)["path"] == str(machine.snapshot)


# remove


def test_remove_asks_first_and_says_what_is_freed(machine):
    machine.run("download", REPO)
    refused = machine.run("remove", REPO)
    assert (refused.exit_code, "give --yes" in refused.stderr) == (2, True)
    assert machine.tree() == USUAL
    done = machine.run("remove", REPO, "--yes")
    assert (done.stdout, done.exit_code) == ("", 0)
    assert "297.9 KiB freed" in done.stderr
    assert not machine.root.exists()
    assert machine.run("remove", REPO, "--yes").exit_code == 3


def test_remove_lists_what_it_deletes_and_nothing_else_goes(machine, tmp_path):
    machine.run("download", REPO)
    done = machine.run("remove", REPO, "--yes")
    for name in USUAL:
        assert f"  snapshots/{COMMIT}/{name}\n" in done.stderr
    evil = tmp_path / "evil"
    evil.mkdir()
    (tmp_path / "thesis.txt").write_text("years of ")
    record = FileRecord(9, "0" * 64, None, True)
    write_manifest(evil / MANIFEST_NAME, Manifest({"../thesis.txt": record}, repo=REPO))
    for command in (("remove", "-y"), ("verify",), ("verify", "--repair"), ("verify", "--fast")):
        done = machine.run(command[0], str(evil), *command[1:])
        assert (done.exit_code, done.stderr.count("\n")) == (3, 1), done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of "


def test_remove_takes_an_unfinished_download(machine):
    machine.run("download", REPO, before="ulimit -f 100")
    assert machine.parts
    assert machine.run("remove", REPO, "-y").exit_code == 0
    assert not machine.root.exists()


def test_remove_waits_for_no_download_and_takes_nothing_from_it(machine):
    machine.run("download", REPO, before="ulimit -f 100")
    before = machine.tree()
    descriptor = os.open(machine.root / "mmchat", os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = machine.run("remove", REPO, "-y")
    assert "another run of mmchat is downloading into" in done.stderr
    assert (done.exit_code, machine.tree(), bool(machine.parts)) == (2, before, True)
    os.close(descriptor)
    assert machine.run("remove", REPO, "-y").exit_code == 0
    assert not machine.root.exists()


def test_remove_leaves_what_others_put_or_share(machine):
    """A file that was there before, a file that came later, and a blob in another revision."""
    blobs = machine.root / "blobs"
    blobs.mkdir(parents=True)
    license_blob = blobs / machine.hub.entry("LICENSE.txt")["oid"]
    license_blob.write_bytes(FILES["LICENSE.txt"])  # by another tool
    machine.run("download", REPO)
    (machine.snapshot / "notes.txt").write_text("mine")
    other = machine.root / "snapshots" / ("ab" * 20)
    other.mkdir()
    blob = (machine.snapshot / "config.json").resolve()
    (other / "config.json").symlink_to(f"../../blobs/{blob.name}")
    assert machine.run("remove", REPO, "--yes").exit_code == 0
    assert license_blob.read_bytes() == FILES["LICENSE.txt"]
    assert machine.tree() == {"notes.txt": b"mine", "LICENSE.txt": FILES["LICENSE.txt"]}
    assert (other / "config.json").read_bytes() == FILES["config.json"]
    assert sorted(path.name for path in blobs.iterdir()) == sorted([license_blob.name, blob.name])


def test_remove_does_not_touch_the_download_of_another_tool(machine):
    machine.run("download", REPO)
    shutil.rmtree(machine.root / "mmchat")
    done = machine.run("remove", REPO, "--yes")
    assert (done.exit_code, f"hf cache rm model/{REPO}" in done.stderr) == (3, True)
    assert machine.tree() == USUAL


@pytest.mark.parametrize("steps", [1, 6, 11])
def test_a_removal_that_was_stopped_is_gone_on_with(machine, monkeypatch, steps):
    machine.run("download", REPO)
    monkeypatch.setenv("HF_HUB_CACHE", str(machine.home / "hub"))
    removal = repo_removal(REPO)
    assert len(removal.files) == 12  # five names, five blobs, the record, the journal
    remove(replace(removal, files=removal.files[:steps]))
    remove(repo_removal(REPO))
    assert not machine.root.exists()


def test_remove_a_local_dir_leaves_the_users_files(machine, tmp_path):
    folder = tmp_path / "here"
    machine.run("download", REPO, "--local-dir", str(folder))
    (folder / "notes.txt").write_text("mine")
    assert machine.run("remove", str(folder), "-y").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert machine.run("remove", str(folder), "-y").exit_code == 3


# verify


def test_verify_finds_a_flipped_bit_names_the_file_and_repairs_it(machine):
    machine.run("download", REPO)
    whole = machine.run("verify", REPO)
    assert whole.stdout == "5 files, 297.9 KiB: every bit as recorded (manifest)\n"
    flip(machine.snapshot / "model.safetensors")
    found = machine.run("verify", REPO)
    assert found.exit_code == 3
    assert found.stdout.startswith("model.safetensors: is not what was recorded")
    assert machine.hub.requests == []
    assert machine.run("verify", REPO, "--fast").exit_code == 0  # the size is right
    repaired = machine.run("verify", REPO, "--repair")
    assert repaired.exit_code == 0, repaired.stderr
    assert machine.tree() == USUAL
    assert [s.path for s in machine.hub.requests if s.server == "cdn"] == ["/model.safetensors"]


def test_verify_finds_missing_and_short_files_fast(machine):
    machine.run("download", REPO)
    (machine.snapshot / "model.safetensors").resolve().write_bytes(WEIGHTS[:-1])
    (machine.snapshot / "config.json").unlink()
    done = machine.run("verify", REPO, "--fast", "--json")
    faults = {fault["file"]: fault["reason"] for fault in json.loads(done.stdout)["faults"]}
    assert faults == {
        "model.safetensors": "has 299,999 bytes, 300,000 are recorded",
        "config.json": "is missing",
    }
    assert done.exit_code == 3
    assert machine.run("verify", REPO, "--repair").exit_code == 0
    assert machine.tree() == USUAL


def test_verify_repairs_a_local_dir(machine, tmp_path):
    folder = tmp_path / "here"
    machine.run("download", REPO, "--local-dir", str(folder))
    flip(folder / "tokenizer.json")
    assert "tokenizer.json: is not what was recorded" in machine.run("verify", str(folder)).stdout
    assert machine.run("verify", str(folder), "--repair").exit_code == 0
    assert (folder / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]


@pytest.mark.parametrize("options", [(), ("--repair",)])
def test_verify_names_the_command_that_exports_a_damaged_folder_again(run_real, tmp_path, options):
    folder = tmp_path / "an export"
    made = run_real("export", "--format", "safetensors", "--quantize", "int8", "-o", str(folder))
    assert made.exit_code == 0, made.stderr
    (folder / "params.json").write_text("{}")
    done = run_real("verify", str(folder), *options)
    assert done.stdout.startswith("params.json: has 2 bytes, ")
    again = f"mmchat export tiny --format safetensors -o '{folder}' --dtype float32 --quantize int8"
    again += " --force"
    assert done.stderr.endswith(f"1 fault, in params.json; export it again: {again}\n")
    assert done.exit_code == 3
    assert run_real(*shlex.split(again)[1:]).exit_code == 0
    assert run_real("verify", str(folder)).exit_code == 0


def test_verify_of_a_damaged_copy_of_the_built_in_model_says_to_copy_it_again(run_real, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(data_path("assets", "tiny"), copied)
    (copied / "tokenizer.model").write_bytes(b"x")
    done = run_real("verify", str(copied))
    assert done.exit_code == 3
    assert f"; copy it again from '{data_path('assets', 'tiny')}'" in done.stderr


def test_verify_says_what_to_export_again_for_the_hub(run_real, tmp_path):
    folder = tmp_path / "hf"
    run_real("export", "tiny", "--format", "hf", "-o", str(folder))
    (folder / "config.json").unlink()
    done = run_real("verify", str(folder), "--repair")
    again = "export 'tiny' again with --format hf --force"
    assert done.stderr.endswith(f"1 fault, in config.json; {again}\n")


def test_verify_knows_the_hashes_of_a_download_by_another_tool(machine):
    machine.run("download", REPO)
    shutil.rmtree(machine.root / "mmchat")
    assert "(names in the cache)" in machine.run("verify", REPO).stdout
    for name in ("model.safetensors", "config.json"):
        flip(machine.snapshot / name)
        assert f"{name}: is not what was recorded" in machine.run("verify", REPO).stdout


def test_verify_reads_metas_checklist(machine, tmp_path):
    folder = tmp_path / "Llama3.2-11B-Vision"
    folder.mkdir()
    files = {"consolidated.00.pth": WEIGHTS, "params.json": b"{}"}
    lines = [f"{hashlib.md5(data).hexdigest()}  {name}" for name, data in files.items()]
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "checklist.chk").write_text("\n".join(lines) + "\n")
    whole = machine.run("verify", str(folder))
    assert whole.stdout == "2 files, 293.0 KiB: every bit as recorded (checklist.chk)\n"
    flip(folder / "consolidated.00.pth")
    (folder / "params.json").unlink()
    done = machine.run("verify", str(folder))
    assert done.exit_code == 3
    assert "consolidated.00.pth: is not what was recorded" in done.stdout
    assert "params.json: is missing" in done.stdout


def test_verify_without_a_record_says_so(machine, tmp_path):
    (tmp_path / "empty").mkdir()
    done = machine.run("verify", str(tmp_path / "empty"))
    assert (done.exit_code, "no manifest" in done.stderr) == (3, True)


@pytest.mark.parametrize("value", ["nan", pytest.param("-inf", marks=pytest.mark.slow)])
def test_verify_values_names_a_tensor_that_is_not_finite(machine, tmp_path, value):
    import torch
    from safetensors.torch import save_file

    from tests.loading.test_loader import random_weights, small_config, write_hf_folder

    config = small_config()
    weights = random_weights(config)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = float(value)
    folder = write_hf_folder(tmp_path / "model", config, weights)
    machine.hub.files = {p.name: p.read_bytes() for p in folder.iterdir()}
    machine.run("download", REPO)
    done = machine.run("verify", REPO, "--values")
    assert done.exit_code == 3
    assert f"model.safetensors: tensor '{name}' holds 1 NaN or infinite values" in done.stdout
    weights[name][3, 5] = 0
    assert torch.isfinite(weights[name]).all()
    save_file(weights, folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", (machine.snapshot / "model.safetensors").resolve())
    assert "NaN" not in machine.run("verify", REPO, "--values").stdout


# The whole road


def test_from_a_repositorys_name_to_text(machine, tmp_path):
    """The hub serves a randomly filled model; it is downloaded, and the model answers."""
    from tests.loading.test_loader import random_weights, small_config, write_hf_folder

    folder = write_hf_folder(tmp_path / "model", small_config(), random_weights(small_config()))
    machine.hub.files = {p.name: p.read_bytes() for p in folder.iterdir()}
    machine.hub.files["original/consolidated.pth"] = b"never fetched" * 1000
    assert machine.run("download", REPO).exit_code == 0
    options = ("-p", "Hello", "-n", "8", "-t", "0", "--json", "--offline")
    here = machine.run("generate", REPO, *options)
    there = machine.run("generate", str(folder), *options)
    assert (here.exit_code, there.exit_code) == (0, 0), here.stderr
    assert json.loads(here.stdout)["output_ids"] == json.loads(there.stdout)["output_ids"]
    assert machine.hub.requests == []
