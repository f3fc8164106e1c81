from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.fake_command import scripted_model
from tests.cli.fake_loading import install
from tests.cli.hub_fixtures import machine  # noqa: F401


@dataclass
class Outcome:
    """What a command printed and how it ended."""

    stdout: str
    stderr: str
    exit_code: int


@dataclass
class Command:
    """Runs `mmchat …` in this process with a scripted model."""

    use: Callable[..., Any]
    loaded: list[Any] = field(default_factory=list)

    def __call__(self, *args: str, stdin: str | bytes = b"") -> Outcome:
        from mmchat.cli.app import app

        done = CliRunner().invoke(app, list(args), input=stdin)
        return Outcome(done.stdout, done.stderr, done.exit_code)


@pytest.fixture
def mmchat_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """`mmchat` as a function; `.use(b"answer", …)` chooses what the model says."""

    def use(*answers: bytes, **options: Any) -> Any:
        model = scripted_model(*answers, **options)
        command.loaded = install(model, monkeypatch.setattr)
        return model

    command = Command(use)
    use(b"A brown dog.")
    return command


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small PNG, 100 high and 200 wide."""
    from PIL import Image

    path = tmp_path / "dog.png"
    Image.new("RGB", (200, 100), (120, 80, 40)).save(path)
    return path


@pytest.fixture
def run_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """`mmchat` as a function with the real finding and loading, and empty caches of models."""
    monkeypatch.setattr("mmchat.checkpoints.exported_folder.kept_folder", lambda: tmp_path / "kept")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return Command(lambda: None)
