"""When a download is offered: only where that is what is missing."""

from __future__ import annotations

import pytest

from mmchat.catalog import known
from mmchat.catalog.known import data_path
from mmchat.cli import console, model_choice
from mmchat.errors import CheckpointError
from mmchat.loading.options import LoadOptions


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Everything that a person at the terminal is asked; the answer is no."""
    questions: list[str] = []
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(model_choice, "is_hub_offline", lambda: False)
    monkeypatch.setattr(console, "is_terminal", lambda _: True)
    monkeypatch.setattr(console, "confirm", lambda text: bool(questions.append(text)))
    return questions


def test_a_model_that_is_not_here_is_offered(asked):
    with pytest.raises(CheckpointError, match=r"'mmchat download Llama-3\.2-11B-Vision' fetches"):
        model_choice.find_or_offer(LoadOptions("Llama-3.2-11B-Vision"))
    assert asked == ["download it now?"]


def test_another_mistake_is_not_mended_by_a_download(asked):
    with pytest.raises(CheckpointError, match=r"typo.*no such folder"):
        model_choice.find_or_offer(LoadOptions("Llama-3.2-11B-Vision", adapter="./typo"))
    assert asked == []


def test_nor_is_a_model_offered_that_is_here(asked, monkeypatch):
    monkeypatch.setattr(known, "folder_on_disk", lambda _: data_path("assets"))
    with pytest.raises(CheckpointError, match="is not on this machine"):
        model_choice.find_or_offer(LoadOptions("Llama-3.2-11B-Vision"))
    assert asked == []
