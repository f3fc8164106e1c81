"""Which device and dtype to run on, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmchat.errors import DeviceError
from mmchat.limits import MIB

if TYPE_CHECKING:
    import torch

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}
SMALL_MODEL_BYTES = 1024 * MIB


@dataclass(frozen=True)
class Placement:
    """Where a model runs. reason: one clause for `-v`."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_placement(
    device: str, dtype: str, parameters: int, released: Literal["bfloat16", "float16"] = "bfloat16"
) -> Placement:
    """Resolve `auto` for a model with `parameters` parameters. Raises DeviceError.

    released: of the weights as their makers published them, which a GPU computes in.
    """
    import torch

    chosen = _device(device)
    if dtype != "auto":
        return Placement(chosen, getattr(torch, dtype_name(dtype)), "as asked")
    if chosen.type == "cuda":
        if released == "float16":
            return Placement(chosen, torch.float16, "the weights' own dtype")
        if torch.cuda.is_bf16_supported():
            return Placement(chosen, torch.bfloat16, "the weights' own dtype")
        return Placement(chosen, torch.float16, "this GPU has no bfloat16")
    if parameters * 4 <= SMALL_MODEL_BYTES:
        return Placement(chosen, torch.float32, "a small model")
    is_own = released == "bfloat16"
    reason = "the weights' own dtype" if is_own else "as wide as the weights, and quick here"
    return Placement(chosen, torch.bfloat16, reason)


def dtype_name(dtype: str) -> str:
    """torch's name of a dtype in the words of DTYPES. Raises DeviceError."""
    name = DTYPES.get(dtype.lower())
    if name is None:
        raise DeviceError(f"unknown dtype {dtype!r}; use auto, bfloat16, float16 or float32")
    return name


def check_device_name(name: str) -> None:
    """Raises DeviceError for what is no device on any machine; imports no torch."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:(0|[1-9][0-9]?))?", name):
        is_gpu = re.fullmatch(r"(?i)(gpu|nvidia|amd|rocm|hip|metal)(:\d+)?", name)
        meant = " (did you mean cuda, or mps on a Mac?)" if is_gpu else ""
        raise DeviceError(f"unknown device {name!r}{meant}; use auto, cpu, cuda, cuda:N or mps")


def _device(name: str) -> torch.device:
    import torch

    check_device_name(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"{count} CUDA device(s)" if count else "no CUDA device"
            raise DeviceError(f"device {name!r} is not here: this machine has {have}; try cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' is not here; try --device cpu")
    return device
