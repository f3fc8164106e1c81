"""Ctrl-C: while a model answers the first one asks it to stop, elsewhere it ends the command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from mmchat.cli import console

INTERRUPTED_EXIT_CODE = 130


@contextmanager
def first_interrupt_calls(stop: Callable[[], object]) -> Iterator[None]:
    """Within the block the first SIGINT calls `stop`, the next raises KeyboardInterrupt.

    A process that ignores SIGINT (a background job) goes on ignoring it.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.SIG_IGN:
        yield
        return

    def on_interrupt(_signal_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.default_int_handler)


@contextmanager
def interrupt_says(message: str) -> Iterator[None]:
    """Within the block Ctrl-C ends the command with `message` and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.note(message)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
