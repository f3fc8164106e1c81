from __future__ import annotations

import pytest

from mmchat.quant.kernels import native
from tests.quant.kernels.available import reason_for_none


@pytest.fixture(autouse=True)
def kernels_are_there_where_a_compiler_is() -> None:
    """A compiler that fails, or takes too long, fails the tests; it does not skip them."""
    if not reason_for_none() and native.library() is None:
        pytest.fail(f"kernels: {native.reason()}")
