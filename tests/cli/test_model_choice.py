"""What is said of the model that was chosen."""

from __future__ import annotations

import pytest

from mmchat.catalog.source import ModelSource
from mmchat.cli import model_choice
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
