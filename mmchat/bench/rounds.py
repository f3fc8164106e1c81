"""Interleaved rounds: A B C, A B C, …, so that a slow minute of the machine slows all alike.

And what every record of such a measurement holds: the machine, the versions, how values spread.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from mmchat.hardware.cpu import describe_cpu

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
_DIGITS = 4  # significant


@dataclass(frozen=True)
class Summary:
    """Of one value per round: the median, the smallest and the largest."""

    median: float
    low: float
    high: float
    rounds: int


def summary(values: Sequence[float]) -> Summary:
    return Summary(median(values), min(values), max(values), len(values))


def interleave(
    runs: Mapping[str, Callable[[int], Result]], *, rounds: int, seconds: float
) -> list[dict[str, Result]]:
    """For each round, what each of `runs` gives for its number; in the same order, at least once.

    No round begins that would, as long as the last one took, end after `seconds`.
    """
    done = []
    begin = last = time.perf_counter()
    for index in range(rounds):
        done.append({name: run(index) for name, run in runs.items()})
        now = time.perf_counter()
        if now - begin + (now - last) > seconds:
            break
        last = now
    return done


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
