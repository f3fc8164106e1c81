"""The processes that share a model: what they add up, gather and tell each other.

There are two groups of the same ranks. In one, those who follow wait for the next call, which may
take hours on one machine; on several, where a cable may be pulled, rank 0 gives signs of life. In
the other everything is answered within `timeout`, or somebody is gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout

import mmchat
from mmchat.errors import CheckpointError, DeviceError, MmchatError, RankError, UsageError
from mmchat.progress import ProgressCallback

if TYPE_CHECKING:
    from mmchat.parallel.launch import Followers

IDLE = 365 * 86_400.0  # seconds: the connection breaks when a process of this machine ends
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.05
_START_SECONDS = 300.0  # for importing torch on a machine with other work
_LAST_SECONDS = 0.5  # in which one that failed says why, and its process ends


class Group:
    """Ranks 0 .. ranks - 1, which have met in `store`. followers: those that rank 0 has started.
    idle: seconds for which a follower waits for the next call.

    Everything that waits for others raises RankError when one is gone or silent for `timeout`
    seconds; nothing can go on after that, and it is raised again.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: int,
        timeout: float,
        followers: Followers | None = None,
        idle: float = IDLE,
    ) -> None:
        self.rank, self.ranks, self.timeout, self.followers = rank, ranks, timeout, followers
        self.lost: RankError | None = None
        self.is_uneven = False  # whether one had room where another had not, once
        self._store = store
        self._meetings = 0
        self._names: list[str] = []
        self._meet()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with self.watched():
            dist.init_process_group(
                backend,
                store=PrefixStore("torch", store),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout),
            )
            # rank 0 waits for nobody that long: to send is to wait until the other takes it
            self._control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            if rank:
                _set_pg_timeout(timedelta(seconds=idle), self._control)

    # ---- the start

    def _meet(self) -> None:
        """Wait for all ranks, and refuse those of another version."""
        here = {
            "name": f"pid {os.getpid()} on {socket.gethostname()}",
            "versions": [mmchat.__version__, torch.__version__],
        }
        said = [json.loads(text) for text in self.exchange(json.dumps(here))]
        self._names = [one["name"] for one in said]
        for rank, one in enumerate(said):
            if one["versions"] != said[0]["versions"]:
                theirs, own = (" and torch ".join(x["versions"]) for x in (one, said[0]))
                raise UsageError(
                    f"rank {rank} ({one['name']}) has mmchat {theirs}, rank 0 mmchat {own};"
                    " install the same on all"
                )

    def exchange(self, text: str) -> list[str]:
        """What each rank says, by rank; waits for all while they give signs of life (`beat`)."""
        self._meetings += 1
        keys = [f"said {self._meetings} {rank}" for rank in range(self.ranks)]
        with self.watched():
            self._store.set(keys[self.rank], text)
            self._wait_for(keys)
            return [self._store.get(key).decode() for key in keys]

    def beat(self) -> None:
        """Say that this rank works, while others wait for it in `exchange`."""
        self._store.add("beats", 1)

    def _wait_for(self, keys: Sequence[str]) -> None:
        beats, since = -1, time.monotonic()
        while not self._store.check(list(keys)):
            if (now := self._store.add("beats", 0)) != beats:
                beats, since = now, time.monotonic()
            if self.followers and self.followers.ended():
                raise RuntimeError("a follower ended")
            patience = self.timeout
            if self.followers and not self._names:  # whose start is watched, and may be slow
                patience = max(patience, _START_SECONDS)
            if time.monotonic() - since > patience:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise _MissingError(missing)
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def agreed(self) -> Iterator[list[str]]:
        """A block that all ranks run; what fails on one is raised on all, at the end of it.

        Gives a list for what must be the same on all of them.
        """
        failure: Exception | None = None
        must_equal: list[str] = []
        try:
            yield must_equal
        except Exception as error:
            failure = error
            if self.lost is not None:
                raise
        code = getattr(failure, "exit_code", 1)
        own = [code, _line(failure)] if failure else [0, must_equal]
        said = [json.loads(text) for text in self.exchange(json.dumps(own))]
        if failure is not None:
            raise failure
        for rank, (code, text) in enumerate(said):
            who = f"rank {rank} ({self._names[rank]})"
            if code:
                raise RankError(f"{who}: {text}", code)
            if text != said[0][1]:
                raise CheckpointError(f"{who} has other weights than rank 0, or other options")

    def beating(self, progress: ProgressCallback | None) -> ProgressCallback:
        """`progress` that is also a sign of life for those who wait."""

        def tell(stage: str, done: int, total: int) -> None:
            self.beat()
            if progress:
                progress(stage, done, total)

        return tell

    @property
    def ranks_here(self) -> int:
        """How many of them share this machine's memory."""
        text = os.environ.get("LOCAL_WORLD_SIZE", "")  # a launcher may leave it empty
        return int(text) if text.isdecimal() else self.ranks

    def device_of(self, device: torch.device) -> torch.device:
        """This rank's device of the kind. Raises DeviceError."""
        if device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise DeviceError(
                f"--parallel takes --device cpu or cuda, and each rank a card; not {device}"
            )
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise DeviceError(
                f"rank {self.rank} would take the CUDA device {number}, and this machine has"
                f" {count}; use --parallel {max(count, 1)} or --device cpu"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    # ---- while a model runs

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, on all of them. On a CPU in float32, whatever x is."""
        total = x.float() if x.is_cpu else x
        total = total.contiguous()
        with self.watched():
            dist.all_reduce(total)
        return total.to(x.dtype)

    def gather(self, x: Tensor, sizes: Sequence[int], *, first: bool) -> Tensor:
        """The ranks' x [..., sizes[rank]] side by side on all of them; first: on rank 0 alone,
        where others keep theirs."""
        widest = max(sizes)
        padded = x.contiguous()
        if x.shape[-1] < widest:
            padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
        holds = not first or self.rank == 0
        parts = [torch.empty_like(padded) for _ in sizes] if holds else None
        with self.watched():
            if first:
                dist.gather(padded, parts, dst=0)
            else:
                dist.all_gather(parts or [], padded)
        if parts is None:
            return x
        own = zip(parts, sizes, strict=True)
        return torch.cat([part[..., :size] for part, size in own], dim=-1)

    def all_can(self, can: bool) -> bool:
        """Whether all ranks can."""
        failing = torch.tensor([0 if can else 1])
        with self.watched():
            dist.all_reduce(failing)
        return not failing.item()

    def announce(self, head: Tensor) -> None:
        """Send `head` of rank 0 to all others, who may wait for it for hours."""
        with self.watched():
            dist.broadcast(head, 0, group=self._control)

    def send(self, tensor: Tensor) -> None:
        """Send rank 0's tensor to all others, in place."""
        with self.watched():
            dist.broadcast(tensor, 0)

    # ---- the end

    def close(self) -> None:
        """End torch's threads: those that Python finds as it ends would abort the process."""
        if dist.is_initialized():
            with self.watched():
                dist.destroy_process_group()

    def look(self) -> None:
        """Notice a follower that ended while nothing was asked of it; `lost` says so then."""
        if self.followers and self.followers.ended():
            with suppress(RankError), self.watched():
                raise RuntimeError("a follower ended")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What torch says when a rank is gone becomes one line."""
        if self.lost is not None:
            raise RankError(str(self.lost), self.lost.exit_code)
        try:
            yield
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise self._lose(self._explained(error)) from None

    def fail(self, error: BaseException) -> RankError:
        """End everything, because this rank failed where others wait for it."""
        code = getattr(error, "exit_code", 1)
        return self._lose(RankError(f"rank {self.rank} failed within a pass: {_line(error)}", code))

    def _lose(self, error: RankError) -> RankError:
        self.lost = self.lost or error
        if self.followers:
            self.followers.end()
        return self.lost

    def last_words(self, error: BaseException) -> None:
        """Leave for rank 0 why this rank ends."""
        text = json.dumps([getattr(error, "exit_code", 1), _line(error)])
        self._store.set(f"last words {self.rank}", text)

    def _explained(self, error: Exception) -> RankError:
        until, found = time.monotonic() + _LAST_SECONDS, None
        while found is None and self.rank == 0 and time.monotonic() < until:
            found = self._words() or (self.followers and self.followers.ended(left=False))
            time.sleep(_POLL_SECONDS)
        if self.rank == 0:  # for others the way to the store may be what is broken
            found = self._words() or found or (self.followers and self.followers.ended())
        if found:
            rank, text, code = found
            return RankError(f"rank {rank} ({self._name(rank)}) {text}", code)
        silent = error.ranks if isinstance(error, _MissingError) else []
        if silent and not self._names:
            return RankError(
                f"{self.ranks - len(silent)} of {self.ranks} ranks came within {self.timeout:g} s"
                f" (--parallel-timeout); missing: {', '.join(map(str, silent))}. {NETWORK}"
            )
        if "imed out" in str(error) or "imeout" in str(error):
            silent = silent or (self.followers.silent() if self.followers else self._others())
            who = ", ".join(f"rank {rank} ({self._name(rank)})" for rank in silent)
            return RankError(f"{who}: no answer for {self.timeout:g} s (--parallel-timeout)")
        gone = "another rank" if self.rank == 0 else f"rank 0 ({self._name(0)})"
        return RankError(f"rank {self.rank}: {gone} is gone")

    def _words(self) -> tuple[int, str, int] | None:
        for rank in self._others():
            key = f"last words {rank}"
            try:
                if self._store.check([key]):
                    code, text = json.loads(self._store.get(key))
                    return rank, f"failed: {text}", code
            except RuntimeError:  # the store is gone as well
                return None
        return None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank != self.rank]

    def _name(self, rank: int) -> str:
        return self._names[rank] if self._names else "not here yet"


NETWORK = (
    "On several machines give MASTER_ADDR as an address that all of them reach, and name the"
    " network interface in GLOO_SOCKET_IFNAME where the host's name does not lead to it"
)


class _MissingError(TimeoutError):
    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__("timed out")
        self.ranks = ranks


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if isinstance(error, MmchatError) else f"{type(error).__name__}: {text}")[:500]


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Signals that end things come at the end: the others would wait for the rest of a pass."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
