"""Time of one piece of work: by the wall, and of the processor; ratios of it, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Elapsed:
    """Seconds. cpu: of all threads of this process, so that no hidden thread works for free."""

    wall: float
    cpu: float

    def __sub__(self, other: Elapsed) -> Elapsed:
        return Elapsed(max(0.0, self.wall - other.wall), max(0.0, self.cpu - other.cpu))

    def __truediv__(self, count: int) -> Elapsed:
        return Elapsed(self.wall / count, self.cpu / count)


class Stopwatch:
    """Times calls on a device; waits for queued work before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Elapsed:
        """Where both clocks stand, with no work of the device pending."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return Elapsed(time.perf_counter(), time.process_time())

    def time(self, work: Callable[[], Result]) -> tuple[Result, Elapsed]:
        begin = self.now()
        result = work()
        return result, self.now() - begin


@dataclass(frozen=True)
class Rounds:
    """What was measured: for each round, contestant -> stage -> time."""

    rounds: Sequence[Mapping[str, Mapping[str, Elapsed]]]

    def seconds(self, contestant: str, stage: str, clock: Clock) -> list[float]:
        """One value per round."""
        return [getattr(each[contestant][stage], clock) for each in self.rounds]

    def ratios(self, slow: str, fast: str, stage: str, clock: Clock) -> list[float]:
        """How many times as long `slow` takes as `fast`, round by round."""
        pairs = zip(self.seconds(slow, stage, clock), self.seconds(fast, stage, clock), strict=True)
        return [a / b for a, b in pairs if b > 0]

    def stages(self, contestant: str) -> tuple[str, ...]:
        return tuple(self.rounds[0][contestant])
