"""What was compared, as parts of one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.clock import Clock, Rounds
from benchmarks.workloads import ONE
from mmchat.bench.rounds import rounded, spread

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


def workload_record(
    measured: Measured, names: Sequence[str], rivals: Mapping[str, str], clock: Clock
) -> dict[str, Any]:
    """One workload: for each contestant its times, its error and how much faster than its rival."""
    rounds, contestants = measured.rounds, {}
    for name in names:
        entry: dict[str, Any] = {"ms": timings(rounds, name, clock)}
        if name in measured.agreements:
            entry["agreement"] = _agreement_record(measured.agreements[name])
        if name in rivals:
            entry["against"] = rivals[name]
            entry["speedup"] = _speedups(rounds, rivals[name], name, clock)
        if measured.workload.rows > 1:
            entry["gain"] = gain(rounds, name, "total", ONE, measured.workload.rows, clock)
        contestants[name] = entry
    return {
        **asdict(measured.workload),
        "title": measured.workload.title,
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


def gain(
    rounds: Rounds, name: str, many: str, one: str, rows: int, clock: Clock
) -> dict[str, float]:
    """How many times as many tokens a second `rows` at once give as one row alone."""
    pairs = zip(rounds.seconds(name, one, clock), rounds.seconds(name, many, clock), strict=True)
    return spread([rows * alone / together for alone, together in pairs])


def _agreement_record(found: Agreement) -> dict[str, Any]:
    return {
        "relative_error": rounded(found.relative_error),
        "kl": rounded(found.kl),
        "top1": found.top1,
    }
