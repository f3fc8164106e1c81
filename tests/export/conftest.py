"""Exports that several test files share: making one takes a minute or two."""

from __future__ import annotations

import fcntl
import os

import pytest

from mmchat.export import ExportPlan, export_model


@pytest.fixture(scope="session")
def tiny_aoti(tmp_path_factory):
    """The built-in model, compiled in float32 for 1,024 positions and three pictures.

    The first worker of a parallel run makes it, and the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "tiny-aoti"
    with (shared / "tiny-aoti.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():  # it appears when it is whole
            export_model(ExportPlan(None, folder, dtype="float32", max_seq_len=1024, max_images=3))
    return folder


@pytest.fixture(scope="session")
def tiny_executorch(tmp_path_factory):
    """The built-in model, lowered to ExecuTorch for 1,024 positions and three pictures."""
    pytest.importorskip("executorch", reason="needs mmchat[executorch]")
    folder = tmp_path_factory.mktemp("exports") / "tiny-executorch"
    export_model(ExportPlan(None, folder, "executorch", max_seq_len=1024, max_images=3))
    return folder
