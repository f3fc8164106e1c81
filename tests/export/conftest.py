"""Exports that several test files share: making one takes minutes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from mmchat.engine.sampling import SamplingParams
from mmchat.export import ExportPlan, export_model
from mmchat.images import from_pil
from mmchat.loading.options import LoadOptions
from tests.loading.test_loader import finish

GREEDY = SamplingParams(temperature=0.0, speculate="off", max_new_tokens=64)


def answers(model: Any, question: str, pictures: Any) -> tuple[int, ...]:
    """The tokens of a greedy answer about drawn pictures."""
    images = [from_pil(picture) for picture in pictures]
    done = finish(model.chat().send(question, images, GREEDY))
    return done.output_ids


def shared_export(tmp_path_factory: pytest.TempPathFactory, format: Any) -> Path:
    """The built-in model, exported in float32 for 1,024 positions and three pictures.

    The first worker of a parallel run makes it, and the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"tiny-{format}"
    with (shared / f"tiny-{format}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():  # it appears when it is whole
            options = LoadOptions(dtype="float32", max_seq_len=1024)
            plan = ExportPlan(options, folder, format, max_images=3)
            export_model(plan)
    return folder


@pytest.fixture(scope="session")
def tiny_aoti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_export(tmp_path_factory, "aoti")


@pytest.fixture(scope="session")
def tiny_executorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch", reason="needs mmchat[executorch]")
    return shared_export(tmp_path_factory, "executorch")
