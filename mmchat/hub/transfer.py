"""Fetch one file into a `.part` beside its place, from where an earlier run stopped.

A part only grows by bytes in their order, so a run may be killed at any moment. What it holds is
hashed again before it is continued, and nothing leaves it before the whole has the right hash.
huggingface_hub starts a file anew after a kill, and compares only its size.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from mmchat.errors import DiskError, NetworkError, quoted
from mmchat.hub.client import LONGEST_WAIT, HubFile, TransientError
from mmchat.storage.safe_files import open_regular

_BLOCK = 1 << 20
_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each try that follows one without a byte
_DIGESTS = {32: hashlib.md5, 40: hashlib.sha1, 64: hashlib.sha256}  # by digits of the result

# read(offset): the bytes from there, or from elsewhere: where they begin, and the bytes in chunks
Read = Callable[[int], AbstractContextManager[tuple[int, Iterable[bytes]]]]


class CancelledError(Exception):
    """The caller asked to stop; what was fetched stays in the part."""


def new_digest(recorded: str, size: int) -> Any:
    """A hash object of the kind that `recorded`, in hexadecimal, was made with.

    sha256, Meta's MD5, or git's sha1 of a header, which has the size, and the content.
    """
    digest = _DIGESTS[len(recorded)](usedforsecurity=False)
    if len(recorded) == 40:
        digest.update(b"blob %d\0" % size)
    return digest


def feed(opened: io.FileIO, digest: Any, report: Callable[[int], None] = lambda _: None) -> str:
    """Read a file to its end into `digest`; what that gives, in hexadecimal. Raises OSError."""
    while block := opened.read(_BLOCK):
        digest.update(block)
        report(len(block))
    return digest.hexdigest()


def has_etag(path: Path, file: HubFile) -> bool:
    """Whether `path` holds exactly the content of `file`; reads it whole if the size is right."""
    try:
        with open_regular(path) as opened:
            if os.fstat(opened.fileno()).st_size != file.size:
                return False
            return feed(opened, new_digest(file.etag, file.size)) == file.etag
    except OSError:
        return False


def fetch_part(
    read: Read, file: HubFile, part: Path, report: Callable[[int], None], cancelled: Event
) -> None:
    """Make `part` the whole content of `file`; the caller holds the lock of the place.

    report: told of bytes as they arrive; negative when a start is made again. Raises NetworkError,
    DiskError, CancelledError; keeps the part unless its content is wrong.
    """
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(part, "r+") as opened:
            _Transfer(read, file, opened, report, cancelled).run()
            os.fsync(opened.fileno())
    except _WrongContentError as wrong:
        part.unlink(missing_ok=True)
        raise NetworkError(f"{quoted(file.path)}: {wrong}; nothing of it was kept") from None
    except OSError as error:
        raise DiskError(
            f"cannot write {quoted(part, 300)}: {error.strerror or error}; what was fetched is"
            " kept, free some space and run the same again"
        ) from None


class _WrongContentError(Exception):
    pass


@dataclass
class _Transfer:
    read: Read
    file: HubFile
    opened: io.FileIO
    report: Callable[[int], None]
    cancelled: Event

    def __post_init__(self) -> None:
        self._digest = new_digest(self.file.etag, self.file.size)
        feed(self.opened, self._digest)
        self._size = self.opened.tell()
        self._is_pieced = self._size > 0  # from several answers, so worth a second start

    def run(self) -> None:
        if self._size > self.file.size:
            self._restart()
        while True:
            self._fill()
            if self._digest.hexdigest() == self.file.etag:
                return
            if not self._is_pieced:
                raise _WrongContentError(
                    "what the server sent does not have the hash of the Hub's list"
                )
            self._restart()
            self._is_pieced = False

    def _restart(self) -> None:
        self.report(-self._size)
        self.opened.seek(0)
        self.opened.truncate()
        self._size = 0
        self._digest = new_digest(self.file.etag, self.file.size)

    def _fill(self) -> None:
        """Read until the size is right; after a fault go on from there, a few times."""
        fruitless = 0
        while self._size < self.file.size:
            before = self._size
            fault = self._read_once()
            if self._size >= self.file.size:
                return
            self._is_pieced = True
            fruitless = 0 if self._size > before else fruitless + 1
            if fruitless > len(_WAITS):
                raise fault
            wait = fault.wait or (_WAITS[fruitless - 1] if fruitless else 0.0)
            if self.cancelled.wait(min(wait, LONGEST_WAIT)):
                raise CancelledError

    def _read_once(self) -> TransientError:
        """Read until an answer ends; why it has ended, if that was too early."""
        try:
            with self.read(self._size) as (start, chunks):
                if start not in (0, self._size):
                    raise _WrongContentError("the server sent another part than was asked for")
                if start < self._size:  # it does not know ranges: from the beginning
                    self._restart()
                for chunk in chunks:
                    self._write(chunk)
        except TransientError as fault:
            return fault
        return TransientError(
            f"{quoted(self.file.path)}: the server ended after {self._size:,} of"
            f" {self.file.size:,} bytes; run the same again to go on"
        )

    def _write(self, chunk: bytes) -> None:
        if self.cancelled.is_set():
            raise CancelledError
        if self._size + len(chunk) > self.file.size:
            raise _WrongContentError(f"the server sent more than its {self.file.size:,} bytes")
        view = memoryview(chunk)
        while view:
            view = view[self.opened.write(view) :]
        self._digest.update(chunk)
        self._size += len(chunk)
        self.report(len(chunk))
