"""What was measured as one JSON object, with all that is needed to judge it."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmchat.bench.agreement import Agreement
from mmchat.bench.rounds import Clock, Rounds, summary
from mmchat.hardware.cpu import describe_cpu

if TYPE_CHECKING:
    import torch

    from mmchat.bench.workloads import Measured

SCHEMA = 1
_DIGITS = 4  # significant


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def environment(
    device: torch.device, dtype: torch.dtype, transformers: str | None
) -> dict[str, Any]:
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
    if transformers:
        found["versions"]["transformers"] = transformers
    return found


def timings(rounds: Rounds, contestant: str, clock: Clock) -> dict[str, Any]:
    """Milliseconds of each stage: median, range and number of rounds by `clock`; the wall's too."""
    stages = {}
    for stage in rounds.stages(contestant):
        values = summary([1000 * s for s in rounds.seconds(contestant, stage, clock)])
        wall = summary([1000 * s for s in rounds.seconds(contestant, stage, "wall")])
        stages[stage] = {
            "median": rounded(values.median),
            "low": rounded(values.low),
            "high": rounded(values.high),
            "wall_median": rounded(wall.median),
            "rounds": values.rounds,
        }
    return stages


def workload_record(measured: Measured, names: Sequence[str], clock: Clock) -> dict[str, Any]:
    """One workload: for each contestant its times, its error and how much faster than the first."""
    reference = names[0]
    contestants = {}
    for name in names:
        entry: dict[str, Any] = {"ms": timings(measured.rounds, name, clock)}
        if name in measured.agreements:
            entry["agreement"] = agreement_record(measured.agreements[name])
        if name != reference:
            entry["speedup"] = speedups(measured.rounds, reference, name, clock)
        contestants[name] = entry
    return {
        **asdict(measured.workload),
        "title": measured.workload.title,
        "against": reference,
        "contestants": contestants,
    }


def speedups(rounds: Rounds, slow: str, fast: str, clock: Clock) -> dict[str, Any]:
    """For the stages that both have alike: the ratio of the two in each round, and its median."""
    found = {}
    for stage in ("total", "vision"):
        if stage in rounds.stages(slow) and stage in rounds.stages(fast):
            ratios = rounds.ratios(slow, fast, stage, clock)
            if ratios:
                values = summary(ratios)
                found[stage] = {
                    "median": rounded(values.median),
                    "low": rounded(values.low),
                    "high": rounded(values.high),
                }
    return found


def agreement_record(found: Agreement) -> dict[str, Any]:
    return {
        "relative_error": rounded(found.relative_error),
        "kl": rounded(found.kl),
        "top1": found.top1,
    }
