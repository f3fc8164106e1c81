"""The file of answers: a line of JSON a row, in order of finishing, whatever ends the run.

Lines are appended whole; what a killed run left half written is cut off by the next. A line says
which row it answers (`custom_id`, and `input`, a hash of what was asked) and under which options
(`run`), so that the next run knows what is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmchat.errors import DiskError, UsageError, disk_errors, quoted
from mmchat.storage import atomic_file
from mmchat.storage.safe_files import open_regular, sync, temporary_file

# Errors of a row that it will have again, unless what it asks has changed
LASTING = ("ImageError", "UsageError", "PromptError", "ContextLengthExceeded", "SchemaError")
SYNC_SECONDS = 2.0  # of answers, that a power cut may cost
_BEGIN = b'{"custom_id": '
_OTHER = "--force writes it anew, or give -o another name"


class Output:
    """answered, failed: `input` of rows by their `custom_id`; "" of a failure that may pass.

    run: of the options. force: forget what the file holds. One run at a time writes it, which holds
    its lock. Raises UsageError if it is another's file or from other options, DiskError.
    """

    def __init__(self, path: Path, run: str, *, force: bool = False, read_only: bool = False):
        self.path, self.run = path, run
        self.answered: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._open = ExitStack()
        self._synced = time.monotonic()
        if read_only:
            atomic_file.refuse_stdout(path)
            if path.exists():
                self._read()
            return
        atomic_file.check_writable(path)
        self.path = path.resolve()
        self._file = self._open.enter_context(_locked(self.path))
        with ExitStack() as failed:
            failed.callback(self.close)
            self._cut(0 if force else self._read())
            failed.pop_all()

    def _read(self) -> int:
        """Where the last whole line ends."""
        end = 0
        with self._lines() as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and (end or line[:14] == _BEGIN[: len(line)]):
                    break  # torn
                try:
                    found = json.loads(line)
                    run = found["run"]
                    self._note(found)
                except (ValueError, LookupError, TypeError):
                    raise UsageError(
                        f"{quoted(self.path)} holds something else (line {number}); {_OTHER}"
                    ) from None
                if run != self.run:
                    raise UsageError(
                        f"{quoted(self.path)} has answers from other options; {_OTHER}"
                    )
                end += len(line)
        return end

    def _lines(self) -> io.BufferedReader:
        with disk_errors(f"cannot read {quoted(self.path)}"):
            return io.BufferedReader(open_regular(self.path.resolve()))

    def _note(self, record: Mapping[str, Any]) -> None:
        custom_id, asked, error = (record[key] for key in ("custom_id", "input", "error"))
        self._drop(custom_id)
        if error is None:
            self.answered[custom_id] = asked
        else:
            self.failed[custom_id] = asked if error["code"] in LASTING else ""

    def _drop(self, custom_id: str) -> None:
        self.answered.pop(custom_id, None)
        self.failed.pop(custom_id, None)

    def forget(self, custom_ids: Collection[str]) -> None:
        """Take out the lines of rows that are asked again: the file is replaced by one without."""
        gone = {i for i in custom_ids if i in self.answered or i in self.failed}
        if not gone:
            return
        new = ExitStack()
        with disk_errors(f"cannot write {quoted(self.path)}"), self._lines() as lines:
            path, file = new.enter_context(temporary_file(self.path.parent, 0o666))
            file.writelines(line for line in lines if json.loads(line)["custom_id"] not in gone)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), stat.S_IMODE(self.path.stat().st_mode))
            path.replace(self.path)  # the lock of what was temporary holds on
            sync(self.path.parent)
        self._open.close()
        self._open, self._file = new, file.raw  # type: ignore[attr-defined]
        for custom_id in gone:
            self._drop(custom_id)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line, or nothing of it. record: of Outcome. Raises DiskError."""
        whole = {**record, "run": self.run}
        try:
            line = json.dumps(whole, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # the name of a file that is no UTF-8
            line = json.dumps(whole, allow_nan=False).encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line + b"\n")
            while left:
                left = left[self._file.write(left) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(DiskError):
                self._cut(end)
            raise DiskError(f"cannot write {quoted(self.path)}: {error.strerror}") from None
        self._note(record)

    def _cut(self, end: int) -> None:
        with disk_errors(f"cannot write {quoted(self.path)}"):
            os.ftruncate(self._file.fileno(), end)

    def close(self) -> None:
        """Make all of it durable, and let others write."""
        with contextlib.suppress(OSError, AttributeError):
            os.fsync(self._file.fileno())
        self._open.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[io.RawIOBase]:
    """The file for reading and writing, made if need be, with its lock. Raises UsageError."""
    with disk_errors(f"cannot write {quoted(path)}"):
        file = open_regular(path, "r+")
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(path.stat(), os.fstat(file.fileno()))  # or replaced just now
        except BlockingIOError:
            is_ours = False
        except OSError:  # a file system without locks
            is_ours = True
        if not is_ours:
            raise UsageError(f"another run is writing {quoted(path)}; wait for it")
        yield file
