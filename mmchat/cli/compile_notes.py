"""Says that layers or kernels are being compiled, which takes seconds, once."""

from __future__ import annotations

import time
from typing import Protocol

from mmchat.progress import ProgressCallback

WHAT = {"compile": "the layers", "kernels": "the CPU kernels"}  # by stage of ProgressCallback


class AnyStages(Protocol):
    """What takes stages and notes, as console.Stages does."""

    def show(self, stage: str) -> None: ...
    def note(self, text: str) -> None: ...


class CompileNotes:
    """A note before it begins, one with the time when it is done, and between them a spinner.

    others: takes the stages that compile nothing.
    """

    def __init__(self, stages: AnyStages, others: ProgressCallback | None = None) -> None:
        self._stages = stages
        self._others = others
        self._begin = 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """A ProgressCallback."""
        what = WHAT.get(stage)
        if what is None:
            if self._others:
                self._others(stage, done, total)
            return
        if done == 0:
            self._begin = time.perf_counter()
            self._stages.note(f"compiling {what} (once; a later start takes them from a cache)")
        seconds = time.perf_counter() - self._begin
        if done == total:
            self._stages.note(f"compiled {what} in {seconds:.1f} s")
        elif total == 1:
            self._stages.show(f"compiling {what}")
        else:
            self._stages.show(f"compiling {what} (once, {seconds:.0f} s): {done} of {total}")
