"""A model whose vision encoder is in another repository is fetched with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmchat.cli.download import _companion
from mmchat.hub.download import Plan, Request
from mmchat.hub.places import FolderPlace
from tests.models.llava.released import HUB_7B, ORIGINAL_7B

REPO = "someone/llava-v1.5-7b"


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
