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
