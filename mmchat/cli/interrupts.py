"""Ctrl-C where no model answers: it ends the command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mmchat.cli import console

INTERRUPTED_EXIT_CODE = 130


@contextmanager
def interrupt_says(message: str) -> Iterator[None]:
    """Within the block Ctrl-C ends the command with `message` and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.note(message)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
