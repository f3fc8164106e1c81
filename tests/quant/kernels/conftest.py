from __future__ import annotations

import pytest

from mmchat.quant.kernels import native
from tests.made_once import made_once
from tests.quant.kernels.available import reason_for_no_compiler, reason_for_none
from tests.quant.kernels.kept_objects import keeping


@pytest.fixture(autouse=True)
def kernels_are_there_where_a_compiler_is() -> None:
    """A compiler that fails, or takes too long, fails the tests; it does not skip them."""
    if not reason_for_none() and native.library() is None:
        pytest.fail(f"kernels: {native.reason()}")


@pytest.fixture
def quick_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The package compiles at -Og, a third of the time, and no file twice in all tests."""
    if not reason_for_no_compiler():
        folder = made_once(tmp_path_factory, "objects", lambda f: keeping(f, native._compiler()))
        monkeypatch.setenv("CC", str(folder / "cc"))
    monkeypatch.setattr(native, "_FLAGS", ("-Og", *native._FLAGS[1:]))
