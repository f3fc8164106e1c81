"""Exports that several test files share: making one takes a minute or two."""

from __future__ import annotations

import pytest

from mmchat.export import ExportPlan, export_model


@pytest.fixture(scope="session")
def tiny_aoti(tmp_path_factory):
    """The built-in model, compiled in float32 for 1,024 positions and three pictures."""
    folder = tmp_path_factory.mktemp("exports") / "tiny-aoti"
    export_model(ExportPlan(None, folder, dtype="float32", max_seq_len=1024, max_images=3))
    return folder


@pytest.fixture(scope="session")
def tiny_executorch(tmp_path_factory):
    """The built-in model, lowered to ExecuTorch for 1,024 positions and three pictures."""
    pytest.importorskip("executorch", reason="needs mmchat[executorch]")
    folder = tmp_path_factory.mktemp("exports") / "tiny-executorch"
    export_model(ExportPlan(None, folder, "executorch", max_seq_len=1024, max_images=3))
    return folder
