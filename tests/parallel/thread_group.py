"""Ranks as threads of this process: all of the package but torch's transport between processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmchat.errors import RankError
from mmchat.loading.loader import load_share
from mmchat.parallel import launch
from mmchat.parallel.group import Group
from mmchat.runtime.eager import EagerRuntime
from mmchat.runtime.mirrored import Follower, driver_of

T = TypeVar("T")
SECONDS = 120


class Board:
    """Where ranks leave what the others take."""

    def __init__(self, ranks: int) -> None:
        self.left: list[Any] = [None] * ranks
        self.all_here = threading.Barrier(ranks, timeout=SECONDS)

    def trade(self, rank: int, thing: T, take: Callable[[list[T]], Any]) -> Any:
        self.left[rank] = thing
        self.all_here.wait()
        taken = take(self.left)
        self.all_here.wait()
        return taken


class ThreadGroup(Group):
    def __init__(self, board: Board, rank: int) -> None:
        self.rank, self.ranks, self.timeout = rank, len(board.left), float(SECONDS)
        self.followers, self.lost, self.is_uneven = None, None, False
        self._names = [f"thread {number}" for number in range(self.ranks)]
        self._board = board
        self.sums = 0

    def exchange(self, text: str) -> list[str]:
        return self._board.trade(self.rank, text, list)

    def beat(self) -> None: ...

    def sum(self, x: Tensor) -> Tensor:
        self.sums += 1
        total = self._board.trade(self.rank, x.float(), lambda all_: sum(all_[1:], all_[0]))
        return total.to(x.dtype)

    def gather(self, x: Tensor, sizes: Sequence[int], *, first: bool) -> Tensor:
        assert x.shape[-1] == sizes[self.rank]
        whole = self._board.trade(self.rank, x, lambda all_: torch.cat(all_, -1))
        return x if first and self.rank else whole

    def all_can(self, can: bool) -> bool:
        return self._board.trade(self.rank, can, all)

    def announce(self, head: Tensor) -> None:
        self.send(head)

    def send(self, tensor: Tensor) -> None:
        sent = self._board.trade(self.rank, tensor, lambda all_: all_[0].clone())
        if self.rank:
            tensor.copy_(sent)


@contextmanager
def ranks_of(count: int) -> Iterator[dict[int, EagerRuntime]]:
    """Within the block `load(parallel=count)` shares its model with threads.

    Gives what the other ranks have loaded last, by rank.
    """
    board = Board(count)
    group = ThreadGroup(board, 0)
    loaded: dict[int, EagerRuntime] = {}

    def follow(group: ThreadGroup) -> None:
        def load(given: Any, repack: bool) -> EagerRuntime:
            loaded[group.rank] = runtime = load_share(given, repack, group)
            return runtime

        Follower(group, load).follow()

    ranks = range(1, count)
    threads = [threading.Thread(target=follow, args=[ThreadGroup(board, r)]) for r in ranks]
    for thread in threads:
        thread.start()
    launch.adopt(group)
    try:
        yield loaded
        driver_of(group).stop()
    except BaseException:
        group.lost = RankError("the test failed")
        board.all_here.abort()
        raise
    finally:
        launch.adopt(None)
        for thread in threads:
            thread.join(SECONDS)
