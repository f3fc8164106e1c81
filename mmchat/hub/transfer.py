"""Fetch one file into a `.part` beside its place, from where an earlier run stopped.

A part only grows by bytes in their order, so a run may be killed at any moment. What it holds is
hashed again before it is continued, and nothing leaves it before the whole has the right hash.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from mmchat.errors import DiskError, NetworkError, quoted
from mmchat.hub.client import HubClient, HubFile, TransientError
from mmchat.storage.safe_files import open_regular, open_to_update

_BLOCK = 1 << 20
_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each try that follows one without a byte


class CancelledError(Exception):
    """The caller asked to stop; what was fetched stays in the part."""


def new_digest(etag: str, size: int) -> Any:
    """The hash that an etag is made with: sha256, or git's sha1 of a header and the content."""
    if len(etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def has_etag(path: Path, file: HubFile) -> bool:
    """Whether `path` holds exactly the content of `file`; reads it whole if the size is right."""
    try:
        with open_regular(path) as opened:
            if os.fstat(opened.fileno()).st_size != file.size:
                return False
            return _feed(opened, new_digest(file.etag, file.size)).hexdigest() == file.etag
    except OSError:
        return False


def _feed(opened: io.FileIO, digest: Any) -> Any:
    while block := opened.read(_BLOCK):
        digest.update(block)
    return digest


def fetch_part(
    client: HubClient,
    commit: str,
    file: HubFile,
    part: Path,
    report: Callable[[int], None],
    cancelled: Event,
) -> None:
    """Make `part` the whole content of `file`; the caller holds the lock of the place.

    report: told of bytes as they arrive; negative when a start is made again. Raises NetworkError,
    DiskError, CancelledError; keeps the part unless its content is wrong.
    """
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open_to_update(part) as opened:
            _Transfer(client, commit, file, opened, report, cancelled).run()
            os.fsync(opened.fileno())
    except _WrongContentError as wrong:
        part.unlink(missing_ok=True)
        raise NetworkError(f"{quoted(file.path)}: {wrong}; nothing of it was kept") from None
    except NetworkError:
        raise
    except OSError as error:
        raise DiskError(
            f"cannot write {quoted(part, 300)}: {error.strerror or error}; what was fetched is"
            " kept, free some space and run the same again"
        ) from None


class _WrongContentError(Exception):
    pass


class _Transfer:
    def __init__(
        self,
        client: HubClient,
        commit: str,
        file: HubFile,
        opened: io.FileIO,
        report: Callable[[int], None],
        cancelled: Event,
    ) -> None:
        self._client, self._commit, self._file = client, commit, file
        self._opened, self._report, self._cancelled = opened, report, cancelled
        self._digest = _feed(opened, new_digest(file.etag, file.size))
        self._size = opened.tell()
        self._is_pieced = self._size > 0  # from several answers, so worth a second start

    def run(self) -> None:
        if self._size > self._file.size:
            self._restart()
        while True:
            self._fill()
            if self._digest.hexdigest() == self._file.etag:
                return
            if not self._is_pieced:
                raise _WrongContentError(
                    "what the server sent does not have the hash of the Hub's list"
                )
            self._restart()
            self._is_pieced = False

    def _restart(self) -> None:
        self._report(-self._size)
        self._opened.seek(0)
        self._opened.truncate()
        self._size = 0
        self._digest = new_digest(self._file.etag, self._file.size)

    def _fill(self) -> None:
        """Read until the size is right; after a fault go on from there, a few times."""
        fruitless = 0
        while self._size < self._file.size:
            before = self._size
            try:
                self._read_once()
                fault = TransientError(
                    f"{quoted(self._file.path)}: the server ended after {self._size:,} of"
                    f" {self._file.size:,} bytes; run the same again to go on"
                )
            except TransientError as error:
                fault = error
            if self._size >= self._file.size:
                return
            self._is_pieced = True
            fruitless = 0 if self._size > before else fruitless + 1
            if fruitless > len(_WAITS):
                raise fault
            wait = fault.wait or (_WAITS[fruitless - 1] if fruitless else 0.0)
            if self._cancelled.wait(min(wait, 60.0)):
                raise CancelledError

    def _read_once(self) -> None:
        with self._client.reading(self._commit, self._file, self._size) as (start, chunks):
            if start not in (0, self._size):
                raise _WrongContentError("the server sent another part than was asked for")
            if start < self._size:  # it does not know ranges: from the beginning
                self._restart()
            for chunk in chunks:
                if self._cancelled.is_set():
                    raise CancelledError
                self._write(chunk)

    def _write(self, chunk: bytes) -> None:
        if self._size + len(chunk) > self._file.size:
            raise _WrongContentError(f"the server sent more than its {self._file.size:,} bytes")
        view = memoryview(chunk)
        while view:
            view = view[self._opened.write(view) :]
        self._digest.update(chunk)
        self._size += len(chunk)
        self._report(len(chunk))
