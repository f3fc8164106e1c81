"""Interleaved rounds: A B C, A B C, …, so that a slow minute of the machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

Result = TypeVar("Result")


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
