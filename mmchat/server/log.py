"""What a server says about itself, on stderr: never a word of what is asked or answered."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback

logger = logging.getLogger("mmchat.server")


class _ToStderr(logging.StreamHandler):
    """What sys.stderr is as a line comes: while a model loads, one that draws a spinner below."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def to_stderr(*, quiet: bool) -> None:
    """A line for each request, unless quiet; failures always. uvicorn's own lines hold paths."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def request(owner: str, route: str, status: int, tokens: int, seconds: float) -> None:
    """route: as it is declared, not as it was asked."""
    logger.info("%s %s %d %d tokens %.0f ms", owner or "-", route, status, tokens, 1000 * seconds)


def content(what: str, text: str) -> None:
    """For --log-content alone. Escaped, so that a text cannot pretend to be another line."""
    logger.info("%s: %s", what, ascii(text))


def bug(failure: BaseException) -> None:
    """Where it failed. Not why: what an exception says may hold what a client sent."""
    frames = traceback.extract_tb(failure.__traceback__)
    places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-6:]))
    logger.error("%s in %s", type(failure).__name__, places)


def take_failures(loop: asyncio.AbstractEventLoop) -> None:
    """Tell failures that nobody waits for as `bug` does: Python itself would say why."""
    loop.set_exception_handler(lambda _, told: told.get("exception") and bug(told["exception"]))
    threading.excepthook = lambda failed: failed.exc_value and bug(failed.exc_value)
