"""When the tests of the C kernels are left out: where none are installed nor can be compiled."""

from __future__ import annotations

import pytest

from mmchat.hardware.cpu import is_arm
from mmchat.quant.kernels import native
from mmchat.quant.kernels.library import UnavailableError


def reason_for_no_compiler() -> str:
    """Why no kernels can be compiled here; empty where they can."""
    try:
        native._compiler()
    except UnavailableError as error:
        return str(error)
    return ""


def reason_for_none() -> str:
    """Why there need not be kernels here: none are installed, and none can be compiled."""
    return "" if native._shipped() else reason_for_no_compiler()


needs_compiler = pytest.mark.skipif(
    bool(reason_for_no_compiler()), reason=f"compiling kernels: {reason_for_no_compiler()}"
)
needs_kernels = pytest.mark.skipif(bool(reason_for_none()), reason=f"kernels: {reason_for_none()}")
needs_packing = pytest.mark.skipif(
    bool(reason_for_none()) or is_arm(), reason="int4 is packed for x86 processors with AVX2"
)
