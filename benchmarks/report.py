"""What was compared, as parts of one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.clock import Clock, Rounds
from mmchat.bench.report import rounded, spread

if TYPE_CHECKING:
    from benchmarks.agreement import Agreement
    from benchmarks.workloads import Measured


def timings(rounds: Rounds, contestant: str, clock: Clock) -> dict[str, Any]:
    """Milliseconds of each stage: median, range and number of rounds by `clock`; the wall's too."""
    stages = {}
    for stage in rounds.stages(contestant):
        wall = spread([1000 * s for s in rounds.seconds(contestant, stage, "wall")])
        stages[stage] = {
            **spread([1000 * s for s in rounds.seconds(contestant, stage, clock)]),
            "wall_median": wall["median"],
            "rounds": len(rounds.rounds),
        }
    return stages


def workload_record(measured: Measured, names: Sequence[str], clock: Clock) -> dict[str, Any]:
    """One workload: for each contestant its times, its error and how much faster than the first."""
    reference = names[0]
    contestants = {}
    for name in names:
        entry: dict[str, Any] = {"ms": timings(measured.rounds, name, clock)}
        if name in measured.agreements:
            entry["agreement"] = _agreement_record(measured.agreements[name])
        if name != reference:
            entry["speedup"] = _speedups(measured.rounds, reference, name, clock)
        contestants[name] = entry
    return {
        **asdict(measured.workload),
        "title": measured.workload.title,
        "against": reference,
        "contestants": contestants,
    }


def _speedups(rounds: Rounds, slow: str, fast: str, clock: Clock) -> dict[str, Any]:
    """For the stages that both have alike: the ratio of the two in each round, and its median."""
    found = {}
    for stage in ("total", "vision"):
        if stage in rounds.stages(slow) and stage in rounds.stages(fast):
            ratios = rounds.ratios(slow, fast, stage, clock)
            if ratios:
                found[stage] = spread(ratios)
    return found


def _agreement_record(found: Agreement) -> dict[str, Any]:
    return {
        "relative_error": rounded(found.relative_error),
        "kl": rounded(found.kl),
        "top1": found.top1,
    }
