"""The process that decodes pictures, as seen from this one: started, asked, ended.

A decoder that crashes, loops or takes all memory ends its own process and one picture with it. The
worker is bounded in time and address space, may write no file, and shares nothing with this process
but two pipes (`process` has its side). Pixels come back as plain bytes of a size that is checked.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from mmchat import limits
from mmchat.errors import ImageError

_LAST_SECONDS = 1.0  # between the end of a process's output and its own
_ANSWER_BYTES = 64 * limits.KIB  # the line before the pixels
# Isolated from the environment, the working folder and other copies of mmchat that are installed:
# behind Python's own library, this package comes first.
_CODE = (
    "import sys; sys.path += sys.argv[1:]; from mmchat.images.worker.process import serve; serve()"
)


class WorkerError(Exception):
    """The worker ended within a picture; the text says why, as the end of a sentence."""


class Worker:
    """One process, which decodes one picture after the other."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[3])
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", _CODE, root, *filter(None, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for this process, which then ends the worker
            )
        except OSError as problem:
            reason = problem.strerror or "unknown reason"
            raise ImageError(f"no process can be started to decode pictures: {reason}") from None
        self._is_late = False
        self._document: object = None  # whose bytes it has
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, AttributeError):  # a wish, and of Linux alone
                fcntl.fcntl(cast(IO[bytes], pipe), fcntl.F_SETPIPE_SZ, limits.MIB)
        self._to = cast(IO[bytes], self._process.stdin)
        self._from = cast(IO[bytes], self._process.stdout)

    def ask(self, request: dict[str, Any], data: bytes, document: object = None) -> dict[str, Any]:
        """Send a picture and return the answer; its pixels, if there are any, must be read next.

        document: stands for `data`, which is sent once for all that is asked of it in a row; None:
        each time. Raises WorkerError.
        """
        is_there = document is not None and document is self._document
        self._document = document
        sent = None if is_there else len(data)
        try:
            self._to.write(json.dumps({**request, "bytes": sent}).encode() + b"\n")
            self._to.write(b"" if is_there else data)
            self._to.flush()
            return json.loads(self._from.readline(_ANSWER_BYTES))
        except (OSError, ValueError):  # a broken pipe, or no whole answer
            raise WorkerError(self._cause()) from None

    def read(self, size: int) -> bytes:
        """The next `size` bytes of pixels. Raises WorkerError."""
        data = self._from.read(size)
        if len(data) < size:
            raise WorkerError(self._cause())
        return data

    def stop(self) -> None:
        """End the process, because its time is over; who waits for it gets WorkerError."""
        self._is_late = True
        self._process.kill()

    def close(self) -> None:
        """End the process and free what belongs to it."""
        self._process.kill()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):  # what was not sent cannot be sent any more
                pipe.close()
        self._process.wait()

    def _cause(self) -> str:
        """Why the process ended, or what it sent is no answer."""
        try:
            code = -self._process.wait(_LAST_SECONDS)  # negative: Python's own, not a signal
        except subprocess.TimeoutExpired:
            code = 0
        if self._is_late or code == signal.SIGXCPU:
            return (
                f"takes longer than {limits.DECODE_CPU_SECONDS:g} s to decode; "
                "save it anew in another program, or smaller"
            )
        if code == signal.SIGKILL:  # as systems do that run out of memory
            return "needs more memory than there is; make it smaller"
        if code < 0:
            return "cannot be decoded: the decoder failed; is mmchat installed as a whole?"
        return "cannot be decoded: it makes the decoder crash; save it anew in another program"


class Pool:
    """At most `size` workers, started when they are first needed and used again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reset()

    def _reset(self) -> None:
        self._turn = threading.Semaphore(self._size)
        self._idle: list[Worker] = []
        self._lock = threading.Lock()

    def allow(self, size: int) -> None:
        """Let at least `size` work at once from now on."""
        with self._lock:
            for _ in range(self._size, size):
                self._turn.release()
            self._size = max(self._size, size)

    def start(self) -> None:
        """Start a worker ahead of the first picture, unless one waits already."""
        with self._lock:
            if not self._idle:
                self._idle.append(Worker())

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """A worker for one picture, for limits.DECODE_WALL_SECONDS.

        A block that is left by an exception leaves an answer half read: that worker is ended.
        """
        with self._turn:
            with self._lock:
                worker = self._idle.pop() if self._idle else Worker()
            watch = threading.Timer(limits.DECODE_WALL_SECONDS, worker.stop)
            watch.daemon = True
            watch.start()
            try:
                yield worker
            except BaseException:
                worker.close()
                raise
            finally:
                watch.cancel()
            with self._lock:
                self._idle.append(worker)

    def close(self) -> None:
        """End the workers that wait; the next picture starts one again."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()


pool = Pool(limits.DECODE_WORKERS)
atexit.register(pool.close)
os.register_at_fork(after_in_child=pool._reset)  # the workers stay the parent's
