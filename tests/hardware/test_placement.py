"""Which dtype `auto` is."""

from __future__ import annotations

import pytest
import torch

from mmchat.catalog.known import find_spec
from mmchat.loading.options import LoadOptions


@pytest.mark.parametrize(
    ("model", "device", "knows_bfloat16", "dtype"),
    [
        ("llama3.2-11B", "cuda", True, torch.bfloat16),
        ("llama3.2-11B", "cuda", False, torch.float16),
        ("llama3.2-11B", "cpu", False, torch.bfloat16),
        ("qwenvl", "cuda", True, torch.bfloat16),
        ("llava", "cuda", True, torch.float16),
        ("llava", "cpu", True, torch.bfloat16),
        ("tiny", "cpu", True, torch.float32),
    ],
)
def test_a_gpu_computes_in_the_dtype_that_was_released(
    model, device, knows_bfloat16, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: knows_bfloat16)
    spec = find_spec(model)
    assert spec is not None, model
    placement = LoadOptions(device=device).placement(spec)
    assert (placement.device.type, placement.dtype) == (device, dtype)
    asked = LoadOptions(device=device, dtype="float32").placement(spec)
    assert asked.dtype == torch.float32
