"""Time of one piece of work: by the wall, and of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


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
