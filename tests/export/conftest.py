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

GREEDY = SamplingParams(temperature=0.0, speculate="off", max_new_tokens=64)


def answers(model: Any, question: str, pictures: Any) -> tuple[int, ...]:
    """The tokens of a greedy answer about drawn pictures."""
    images = [from_pil(picture) for picture in pictures]
    done = finish(model.chat().send(question, images, GREEDY))
    return done.output_ids


def shared_export(tmp_path_factory: pytest.TempPathFactory, format: Any) -> Path:
    """The built-in model, exported in float32 for 1,024 positions and three pictures."""

    def export(folder: Path) -> None:  # it appears when it is whole
        options = LoadOptions(dtype="float32", max_seq_len=1024)
        export_model(ExportPlan(options, folder, format, max_images=3))

    return made_once(tmp_path_factory, f"tiny-{format}", export)


@pytest.fixture(scope="session")
def tiny_aoti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_export(tmp_path_factory, "aoti")


@pytest.fixture(scope="session")
def tiny_executorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch", reason="needs mmchat[executorch]")
    return shared_export(tmp_path_factory, "executorch")
