"""A model whose vision encoder is in another repository is fetched with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mmchat.checkpoints.manifest import FileRecord, Manifest, write_manifest
from mmchat.cli.download import _companion
from mmchat.hub.download import Plan, Request
from mmchat.hub.places import CachePlace, FolderPlace
from tests.cli.conftest import Command
from tests.models.llava.released import HUB_7B, ORIGINAL_7B

REPO = "someone/llava-v1.5-7b"
TOWER = "openai/clip-vit-large-patch14-336"


def plan(folder: Path, request: Request) -> Plan:
    return Plan(request, "0" * 40, FolderPlace(folder), (), (), 0, 0)


@pytest.mark.parametrize(
    ("document", "expected"),
    [(ORIGINAL_7B, "openai/clip-vit-large-patch14-336"), (HUB_7B, None), ({}, None)],
)
def test_what_comes_beside_follows_from_the_config(tmp_path, document, expected, capsys):
    (tmp_path / "config.json").write_text(json.dumps(document))
    found = _companion(REPO, plan(tmp_path, Request(REPO, token="t")))
    assert (found and found.repo) == expected
    if found:
        assert (found.revision, found.local_dir, found.token) == ("main", None, "t")
        assert f"needs the vision encoder {expected} as well" in capsys.readouterr().err


def test_nothing_comes_beside_single_files_or_what_is_not_there(tmp_path):
    assert _companion(REPO, plan(tmp_path, Request(REPO))) is None
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_7B))
    assert _companion(REPO, plan(tmp_path, Request(REPO, include=("*.json",)))) is None
    assert _companion("llava-1.5-7b", plan(tmp_path, Request(REPO))) is None


def downloaded(cache: Path, repo: str, name: str, data: bytes) -> Path:
    """A repository of one file in the cache, as mmchat puts it there; its snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest(), None, True)
    place = CachePlace(root, folder.name)
    place.manifest_path.parent.mkdir()
    write_manifest(place.manifest_path, Manifest({name: record}, repo=repo))
    return folder


def test_list_verify_and_remove_know_what_comes_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    run = Command(lambda: None)

    def state() -> str:
        models = json.loads(run("list", "--json").stdout)
        return next(model["state"] for model in models if model["name"] == REPO)

    downloaded(tmp_path, REPO, "config.json", json.dumps(ORIGINAL_7B).encode())
    assert state() == "incomplete"
    tower = downloaded(tmp_path, TOWER, "pytorch_model.bin", b"weights")
    assert state() == "present"
    found = json.loads(run("verify", REPO, "--json").stdout)
    assert (found["files"], found["companion"]["files"]) == (["config.json"], ["pytorch_model.bin"])
    (tower / "pytorch_model.bin").write_bytes(b"Weights")
    damaged = run("verify", REPO)
    assert damaged.stdout.splitlines()[1].startswith("pytorch_model.bin: is not what was recorded")
    assert (damaged.exit_code, "1 fault, in pytorch_model.bin" in damaged.stderr) == (3, True)
    done = run("remove", REPO, "-y")
    assert done.stderr.endswith(f"its vision encoder stays; 'mmchat remove {TOWER}' removes it\n")
