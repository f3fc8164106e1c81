"""What a server says about itself, on stderr: never a word of what is asked or answered."""

from __future__ import annotations

import logging
import traceback

logger = logging.getLogger("mmchat.server")


def bug(failure: BaseException) -> None:
    """Where it failed. Not why: what an exception says may hold what a client sent."""
    frames = traceback.extract_tb(failure.__traceback__)
    places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-6:]))
    logger.error("%s in %s", type(failure).__name__, places)
