"""How the ranks come to be: followers that rank 0 starts, or processes of torchrun or srun."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mmchat.errors import RankError, UsageError, quoted

if TYPE_CHECKING:
    from mmchat.parallel.group import Group

_CODE = "import sys; sys.path += sys.argv[1:]; from mmchat.loading.follower import main; main()"
LEFT = 75  # exit code of a follower that others have left; it says nothing of why they did
_WORDS = 300  # characters of the last line that a process wrote
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_group: Group | None = None  # torch has one a process


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks a launcher has started with this one; 1 without a launcher."""
    text = environment.get("WORLD_SIZE", "")
    is_set = all(environment.get(name) for name in _VARIABLES)
    return int(text) if is_set and text.isdecimal() else 1


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank among them. Raises UsageError for one that is none of theirs."""
    ranks = launched_ranks(environment)
    text = environment["RANK"] if ranks > 1 else "0"
    if not text.isdecimal() or int(text) >= ranks:
        raise UsageError(f"RANK {quoted(text)} is none of 0 to {ranks - 1} (WORLD_SIZE {ranks})")
    return int(text)


def adopt(group: Group | None) -> None:
    """Let models of this process be shared by `group`; None: by ranks that are started for them."""
    global _group
    _group = group


def group_of(ranks: int, timeout: float) -> Group:
    """The group of this process, which is started once.

    Raises RankError, and UsageError for another number of ranks than before.
    """
    group = _group or _start(ranks, timeout)
    adopt(group)
    if group.ranks != ranks:
        raise UsageError(
            f"this process shares models with {group.ranks} ranks; not with {ranks} as well"
        )
    return group


def lost() -> RankError | None:
    """Why the models of this process answer no more; None while they do, or are its alone."""
    if _group is None:
        return None
    _group.look()
    return _group.lost


def join(timeout: float, idle: float) -> Group:
    """Meet the ranks that a launcher, or rank 0, has started; both in seconds, as in Group.

    Raises RankError, and UsageError for a port that is none.
    """
    rank, ranks, host, port = (os.environ[name] for name in _VARIABLES)
    if not port.isdecimal() or not 0 < int(port) < 65_536:
        raise UsageError(f"MASTER_PORT {quoted(port)} is no port; give one from 1 to 65535")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch would add its stack
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    from mmchat.parallel.group import NETWORK, Group

    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            int(port),
            int(ranks),
            rank == "0" and not has_agent,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        reason = "is in use" if "EADDRINUSE" in str(error) else "cannot be reached"
        raise RankError(f"rank {rank}: {quoted(f'{host}:{port}')} {reason}. {NETWORK}") from None
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"mmchat {again}", store)
    return Group(store, int(rank), int(ranks), timeout, idle=idle)


def _start(ranks: int, timeout: float) -> Group:
    import torch
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    from mmchat.parallel.group import Group

    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    listening = socket.create_server(("127.0.0.1", 0))  # torch's own would be open to all
    port = listening.getsockname()[1]
    store = TCPStore(
        "127.0.0.1",
        port,
        ranks,
        True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    followers = Followers(ranks, port, torch.get_num_threads(), timeout)
    try:
        return Group(PrefixStore("mmchat 0", store), 0, ranks, timeout, followers)
    except BaseException:
        followers.end()
        raise


class Followers:
    """The processes of ranks 1 and more on this machine, which end when this one does."""

    def __init__(self, ranks: int, port: int, threads: int, timeout: float) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._said: dict[int, IO[bytes]] = {}
        root = str(Path(__file__).parents[2])
        for rank in range(1, ranks):
            place = {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(threads), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "MMCHAT_PARALLEL_TIMEOUT": str(timeout),
            }  # fmt: skip
            self._said[rank] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
            self._processes[rank] = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-c", _CODE, root],
                stdin=subprocess.PIPE,  # which breaks when this process ends, however it does
                stdout=subprocess.DEVNULL,
                stderr=self._said[rank],
                env=os.environ | place,
                start_new_session=True,  # Ctrl-C is for this process
            )
        atexit.register(self.end)

    def ended(self, *, left: bool = True) -> tuple[int, str, int] | None:
        """(rank, how it ended, exit code) of the first that did. left: also by what others did."""
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None and (left or code != LEFT):
                how = f"was ended by {_signal(-code)}" if code < 0 else f"ended with exit {code}"
                said = self._last_line(rank)
                return rank, f"{how}: {said}" if said else how, code if code == 5 else 1
        return None

    def silent(self) -> list[int]:
        """Those that are stopped, or all."""
        running = list(self._processes)
        return [rank for rank in running if self._is_stopped(rank)] or running

    def end(self) -> None:
        """They have nothing to lose."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _last_line(self, rank: int) -> str:
        file = self._said[rank]
        file.seek(0)
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_WORDS]

    def _is_stopped(self, rank: int) -> bool:
        if not hasattr(os, "waitid"):
            return False
        pid, wanted = self._processes[rank].pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(OSError):
            return os.waitid(os.P_PID, pid, wanted) is not None
        return False


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def end_with_parent() -> None:
    """End this process when the one that started it does, however that ends."""
    if os.environ.get("LOCAL_RANK") and sys.platform == "linux":  # torchrun's, if it is killed
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_pipe(pipe: IO[bytes]) -> None:
    """End this process when nobody holds the other end of `pipe` any more."""

    def watch() -> None:
        pipe.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
