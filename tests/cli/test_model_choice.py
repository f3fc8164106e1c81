"""What is said of the model that was chosen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mmchat.catalog.source import ModelSource
from mmchat.cli import download, model_choice
from mmchat.loading.options import LoadOptions


@pytest.fixture
def opened(monkeypatch):
    """How often the checkpoint was opened for its format."""
    counted: list[int] = []
    monkeypatch.setattr(ModelSource, "format", property(lambda _: counted.append(1) or "hf"))
    return counted


def test_the_checkpoint_is_opened_only_for_a_tag_that_says_how_it_is_rounded(opened, capsys):
    source = LoadOptions().find()
    model_choice.say_choice(LoadOptions("tiny"), source)
    assert (opened, capsys.readouterr().err) == ([], "")
    model_choice.say_choice(LoadOptions("llama3.2-vision:11b-instruct-q4_K_M"), source)
    assert opened == [1]
    assert "weights as they are published" in capsys.readouterr().err


def test_what_a_download_says_to_run_is_what_it_fetched(monkeypatch, tmp_path, mmchat_command):
    said: list[tuple[str, Path]] = []
    plan = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr("mmchat.hub.download.plan", lambda *_: plan)
    monkeypatch.setattr(download, "carry_out", lambda *_, **__: SimpleNamespace(arrived=0))
    for name in ("say_plan", "_companion", "_record"):
        monkeypatch.setattr(download, name, lambda *_: None)
    monkeypatch.setattr(download, "_say_adapter", lambda *given: said.append(given))
    assert mmchat_command("download", "me/tuned", "--local-dir", str(tmp_path)).exit_code == 0
    assert mmchat_command("download", "me/tuned").exit_code == 0
    assert said == [(str(tmp_path), tmp_path), ("me/tuned", tmp_path)]
