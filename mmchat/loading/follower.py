"""What runs in the processes that share a model with rank 0: they load and call what it does."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

from mmchat.errors import MmchatError, RankError
from mmchat.offline import go_offline
from mmchat.parallel import launch


def main() -> None:
    """The process of a rank that rank 0 has started on this machine; it is left by its end."""
    from mmchat.parallel.group import IDLE

    launch.end_with_pipe(sys.stdin.buffer)
    follow(float(os.environ["MMCHAT_PARALLEL_TIMEOUT"]), IDLE, launch.LEFT)


def follow(timeout: float, idle: float, left: int = RankError.exit_code) -> NoReturn:
    """Share models with rank 0 until it ends; the process ends with it.

    Says on stderr why, where it is not rank 0 that ends it. left: the exit code where others are
    gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for rank 0, which knows what to do
    go_offline()  # rank 0 has seen to it that all is here
    group = None
    try:
        group = launch.join(timeout, idle)
        _follow(group)
        code = 0
    except BaseException as error:
        code = left if isinstance(error, RankError) else getattr(error, "exit_code", 1)
        if group is not None and not isinstance(error, RankError):
            with suppress(Exception):  # where even the store is gone
                group.last_words(error)
        text = str(error) if isinstance(error, MmchatError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            os.write(2, f"mmchat: {' '.join(text.split())}\n".encode())
    os._exit(code)  # threads of torch may wait for those that are gone


def _follow(group: Any) -> None:
    from mmchat.loading.loader import load_share
    from mmchat.runtime.mirrored import Follower

    Follower(group, lambda given, repack: load_share(given, repack, group)).follow()
