"""Interleaved rounds: A B C, A B C, …, so that a slow minute of the machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from mmchat.bench.clock import Elapsed

Clock = Literal["cpu", "wall"]
# One run of a contestant in round i: time of each stage.
Run = Callable[[int], Mapping[str, Elapsed]]


@dataclass(frozen=True)
class Summary:
    """Of one value per round: the median, the smallest and the largest."""

    median: float
    low: float
    high: float
    rounds: int


def summary(values: list[float]) -> Summary:
    return Summary(median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Rounds:
    """What was measured: for each round, contestant -> stage -> time."""

    rounds: tuple[Mapping[str, Mapping[str, Elapsed]], ...]

    def seconds(self, contestant: str, stage: str, clock: Clock) -> list[float]:
        """One value per round."""
        return [getattr(each[contestant][stage], clock) for each in self.rounds]

    def ratios(self, slow: str, fast: str, stage: str, clock: Clock) -> list[float]:
        """How many times as long `slow` takes as `fast`, round by round."""
        pairs = zip(self.seconds(slow, stage, clock), self.seconds(fast, stage, clock), strict=True)
        return [a / b for a, b in pairs if b > 0]

    def stages(self, contestant: str) -> tuple[str, ...]:
        return tuple(self.rounds[0][contestant])


def interleave(runs: Mapping[str, Run], *, rounds: int, seconds: float) -> Rounds:
    """Run all contestants once per round, in the same order, at least one round.

    No round begins that would, as long as the last one took, end after `seconds`.
    """
    done = []
    begin = last = time.perf_counter()
    for index in range(rounds):
        done.append({name: dict(run(index)) for name, run in runs.items()})
        now = time.perf_counter()
        if now - begin + (now - last) > seconds:
            break
        last = now
    return Rounds(tuple(done))
