"""Bars on stderr for files on their way: size, rate and time left; silent unless a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmchat.cli import console
from mmchat.terminal import sanitize

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_NAME_WIDTH = 36


class TransferBars:
    """One bar for each file that moves, and one for all; made by `transfer_bars`."""

    def __init__(self, progress: Progress | None, sizes: dict[str, int], total: int) -> None:
        self._progress = progress
        self._sizes = sizes
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self.arrived = 0  # bytes of this run
        if progress is not None:
            self._all = progress.add_task("all", total=total)

    def note(self, text: str) -> None:
        """A line on stderr, above the bars."""
        if self._progress is None:
            console.note(text)
        else:
            self._progress.console.print(sanitize(text), style="dim")

    def report(self, path: str, count: int) -> None:
        """`count` bytes of `path` came; called from several threads."""
        with self._lock:
            self.arrived += max(count, 0)
            if self._progress is None:
                return
            if path not in self._tasks:
                label = sanitize(path)[-_NAME_WIDTH:]
                self._tasks[path] = self._progress.add_task(label, total=self._sizes.get(path))
            self._progress.advance(self._tasks[path], count)
            self._progress.advance(self._all, count)
            task = next(t for t in self._progress.tasks if t.id == self._tasks[path])
            if task.finished:
                self._progress.update(task.id, visible=False)


@contextmanager
def transfer_bars(
    sizes: dict[str, int], total: int, *, quiet: bool = False
) -> Iterator[TransferBars]:
    """sizes: bytes of each file; total: bytes that will come."""
    if quiet or not total or not console.is_terminal(sys.stderr):
        yield TransferBars(None, sizes, total)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.rich_console(), transient=True) as progress:
        yield TransferBars(progress, sizes, total)
