"""When the tests of the C kernels are left out: where there is no compiler, and only there."""

from __future__ import annotations

import pytest

from mmchat.hardware.cpu import is_arm
from mmchat.quant.kernels import native
from mmchat.quant.kernels.library import UnavailableError


def reason_for_none() -> str:
    """Why there need not be kernels here; empty where a compiler should have made them."""
    try:
        native._compiler()
    except UnavailableError as error:
        return str(error)
    return ""


needs_kernels = pytest.mark.skipif(bool(reason_for_none()), reason=f"kernels: {reason_for_none()}")
needs_packing = pytest.mark.skipif(
    bool(reason_for_none()) or is_arm(), reason="int4 is packed for x86 processors with AVX2"
)
