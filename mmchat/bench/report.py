"""What every record of a measurement holds: the machine, the versions, and how values spread."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmchat.bench.rounds import summary
from mmchat.hardware.cpu import describe_cpu

if TYPE_CHECKING:
    import torch

_DIGITS = 4  # significant


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    found = summary(values)
    return {name: rounded(getattr(found, name)) for name in ("median", "low", "high")}


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    import mmchat

    cpu = describe_cpu()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu.model,
        "isa": list(cpu.isa),
        "cores": os.cpu_count(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "mmchat": mmchat.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
