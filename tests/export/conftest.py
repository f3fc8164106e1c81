"""Exports that several test files share: making one takes minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmchat.engine.sampling import SamplingParams
from mmchat.export import ExportPlan, export_model
from mmchat.images import from_pil
from mmchat.loading.options import LoadOptions
from tests.loading.test_loader import finish
from tests.made_once import made_once
from tests.test_readme import blocks, run

GREEDY = SamplingParams(temperature=0.0, speculate="off", max_new_tokens=64)


def commands_of_the_page() -> list[str]:
    """How docs/export.md exports the built-in model, and asks what was written."""
    [block] = blocks("sh export")
    return block.splitlines()


def answers(model: Any, question: str, pictures: Any) -> tuple[int, ...]:
    """The tokens of a greedy answer about drawn pictures."""
    images = [from_pil(picture) for picture in pictures]
    done = finish(model.chat().send(question, images, GREEDY))
    return done.output_ids


@pytest.fixture(scope="session")
def tiny_aoti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, exported as docs/export.md says."""

    def export(folder: Path) -> None:
        done = run(commands_of_the_page()[0], TMPDIR=str(folder.parent))
        assert done.returncode == 0, done.stderr
        assert str(folder) in done.stdout

    return made_once(tmp_path_factory, "tiny-aoti", export)


@pytest.fixture(scope="session")
def tiny_executorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for as many positions and pictures."""
    pytest.importorskip("executorch", reason="needs mmchat[executorch]")

    def export(folder: Path) -> None:  # it appears when it is whole
        options = LoadOptions(dtype="float32", max_seq_len=1024)
        export_model(ExportPlan(options, folder, "executorch", max_images=3))

    return made_once(tmp_path_factory, "tiny-executorch", export)
