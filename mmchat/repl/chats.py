"""Where chats are: each is a folder in the folder of chats, and one program at a time writes it.

A name means a chat in there. What has a `/` in it, or ends in .json, is a path: a copy that was
saved elsewhere, which nothing is ever saved to unasked.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmchat.conversation import Conversation
from mmchat.errors import (
    MmchatError,
    SavedChatError,
    UsageError,
    disk_errors,
    permission_errors,
    quoted,
)
from mmchat.repl import saving
from mmchat.repl.saving import DOCUMENT, PICTURES
from mmchat.strict_json import nearest

NAME_BYTES = 200
SAVE_SECONDS = 1.5  # at most this much of an answer is lost in a crash
_TIME = re.compile(r"\d{4}-\d\d-\d\d_\d{6}(-\d+)?")


@dataclass(eq=False)
class ChatFolder:
    """A chat on disk that this program holds until `close`; written each time as a whole."""

    path: Path
    _descriptor: int
    was_asked_for: bool = False  # somebody was told that this name brings it back
    is_empty: bool = False  # nothing is asked in it, as far as this program made or wrote it

    @property
    def is_named(self) -> bool:
        """Whether somebody chose its name, or was told of it."""
        return self.was_asked_for or not _TIME.fullmatch(self.path.name)

    def write(self, chat: saving.SavedChat) -> None:
        """Raises DiskError."""
        saving.write_folder(self.path, chat)
        self.is_empty = not chat.conversation.turns

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def remove(self) -> None:
        """Take the chat off the disk, the document last; what is not of the chat stays.

        Raises DiskError.
        """
        pictures = self.path / PICTURES
        with disk_errors(f"cannot remove {quoted(self.path, 300)}"):
            is_ours = pictures.is_dir() and not pictures.is_symlink()
            for file in pictures.iterdir() if is_ours else ():
                if file.suffix == ".png" and saving.HASH.fullmatch(file.stem):
                    file.unlink()
            (self.path / DOCUMENT).unlink(missing_ok=True)
        for folder in (pictures, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.close()


def new_name() -> str:
    return time.strftime("%Y-%m-%d_%H%M%S")


def new_chat(chats: Path, name: str | None = None) -> ChatFolder:
    """A new folder by `name`, or by the time; numbered if there is one already. Raises DiskError.

    Making the folder takes the name, so that two programs never get the same.
    """
    saving.make_private_folder(chats)
    name = name or new_name()
    for number in itertools.count(1):
        path = chats / (name if number == 1 else f"{name}-{number}")
        making = disk_errors(f"cannot make the folder {quoted(path)}")
        with making, contextlib.suppress(FileExistsError):
            path.mkdir(mode=saving.PRIVATE_FOLDER)
            if made := hold(path):
                made.is_empty = True
                return made
    raise AssertionError("numbers do not end")


def hold(path: Path) -> ChatFolder | None:
    """A chat for this program alone; None while another one has it. Raises DiskError.

    Where the file system has no locks, nothing is refused.
    """
    with disk_errors(f"cannot open {quoted(path)}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return ChatFolder(path, descriptor)


def is_name(text: str) -> bool:
    """Whether `text` means a chat by its name, not by a path."""
    return "/" not in text and not text.startswith("~") and not text.lower().endswith(".json")


def find_chat(name: str, chats: Path) -> Path:
    """A saved chat by its name in `chats`, or by path. Raises SavedChatError."""
    if is_name(name):
        if name.strip(".") and _is_chat(chats / name):
            return chats / name
        names = [file.parent.name for file in _documents(chats)]
        hint = nearest(name, names) or "; mmchat chats lists them"
        for here in (f"./{name}", f"./{name}.json"):
            if _is_chat(Path(here)):
                hint = f" in {quoted(chats)}; {quoted(here)} means the one here"
        raise SavedChatError(f"no saved chat {quoted(name)}{hint}")
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - no error for no such ~user
    if not _is_chat(path):
        raise SavedChatError(f"no saved chat at {quoted(name)}")
    return chats / path.resolve().name if path.resolve().parent == chats.resolve() else path


def _is_chat(path: Path) -> bool:
    # Not by Path, for which a name that is too long is an error
    return any(map(os.path.isfile, (path / DOCUMENT, path)))


@permission_errors(SavedChatError)
def _documents(chats: Path) -> list[Path]:
    """The documents in `chats`, the one that was changed last first; no link leads to one.

    Raises SavedChatError if the folder may not be read.
    """
    found = []
    if chats.exists() and not os.access(chats, os.R_OK | os.X_OK):
        raise SavedChatError(f"{quoted(chats)} may not be read; change its permissions")
    for file in chats.glob(f"*/{DOCUMENT}"):
        with contextlib.suppress(OSError):  # removed meanwhile
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and not file.parent.is_symlink():
                found.append((status.st_mtime_ns, file))
    return [file for _, file in sorted(found, reverse=True)]


def latest_chat(chats: Path) -> Path:
    """The chat that was changed last. Raises SavedChatError if there is none."""
    for found in _chats(chats):
        return found.path
    raise SavedChatError(f"there is no chat to continue in {quoted(chats)}")


@dataclass(frozen=True)
class ChatFacts:
    """A chat in a list. pictures: a picture that is attached twice counts twice.

    changed: seconds since 1970. problem: why it cannot be read, or empty.
    """

    path: Path
    changed: float
    model: str = ""
    turns: int = 0
    pictures: int = 0
    question: str = ""
    problem: str = ""


def list_chats(chats: Path) -> list[ChatFacts]:
    """All chats, the one that was changed last first."""
    return list(_chats(chats))


def _chats(chats: Path) -> Iterator[ChatFacts]:
    """Those in which something is asked, or that cannot be read."""
    return (one for one in map(_facts, _documents(chats)) if one.turns or one.problem)


def _facts(file: Path) -> ChatFacts:
    changed = file.stat().st_mtime
    try:
        document, _ = saving.read_document(file.parent)
    except MmchatError as error:
        return ChatFacts(file.parent, changed, problem=str(error))
    parts = document.turns[0].question if document.turns else ()
    question = "".join(part.text or "" for part in parts)
    every = [part for turn in document.turns for part in turn.question]
    pictures = sum(part.image is not None for part in every)
    counts = len(document.turns), pictures
    return ChatFacts(file.parent, changed, document.model, *counts, question)


@dataclass(eq=False)
class Keeper:
    """Saves the chat as it goes; gives up with one note if the disk does not take it.

    chats: the folder of all chats. folder: the one of this chat, from its first save on. as_saved:
    a conversation with model and settings. saves: False saves only what `save_as` is asked for.
    """

    chats: Path
    as_saved: Callable[[Conversation], saving.SavedChat]
    note: Callable[[str], None]
    saves: bool
    folder: ChatFolder | None = None
    _saved_at: float = 0.0

    def start_new(self) -> None:
        """What comes next is another chat; this one is free for others, or gone if it is empty."""
        if self.folder is not None:
            if self.folder.is_empty:
                with contextlib.suppress(MmchatError):
                    self.folder.remove()
            self.folder.close()
        self.folder = None

    def go_on(self, path: Path) -> None:
        """What comes next belongs to the chat at `path`, or to a copy if another program has it."""
        if self.saves and self.folder is not None and self.folder.path == path:
            return  # to leave it first would remove it where it is empty
        self.start_new()
        if not self.saves:
            return
        try:
            self.folder = hold(path)
            if self.folder is None:
                self.folder = new_chat(self.chats, path.name)
                name, copy = quoted(path.name), quoted(self.folder.path.name)
                self.note(f"{name} is open in another window; this one goes on as {copy}")
        except MmchatError as error:
            self._give_up(error)

    def save(self, chat: Conversation) -> None:
        if not self.saves:
            return
        self._saved_at = time.monotonic()
        try:
            if self.folder is None and chat.turns:
                self.folder = new_chat(self.chats)
            if self.folder is not None:
                self.folder.write(self.as_saved(chat))
        except MmchatError as error:
            self._give_up(error)

    def _give_up(self, error: MmchatError) -> None:
        self.note(f"this chat is no longer saved: {error}")
        self.start_new()
        self.saves = False

    def save_as(self, name: str, chat: Conversation) -> None:
        """Give the chat a name; it goes on under that. Raises UsageError, DiskError.

        A chat that was saved by a name before stays under that name, too.
        """
        before = self.folder
        if before is not None and before.path == self.chats / name:
            before.write(self.as_saved(chat))
            before.was_asked_for = True
            return
        if not name.isprintable() or name.startswith(".") or len(name.encode()) > NAME_BYTES:
            raise UsageError(
                f"{quoted(name)} is no name for a chat: printable letters, at most {NAME_BYTES}"
                " bytes, no dot in front"
            )
        if (self.chats / name).exists():
            raise UsageError(
                f"there is a chat {quoted(name)} already; give another name, or remove it by"
                f" mmchat chats --remove {quoted(name)}"
            )
        folder = new_chat(self.chats, name)
        try:
            folder.write(self.as_saved(chat))
        except MmchatError:
            folder.remove()
            raise
        if before is not None and not before.is_named:
            before.remove()
        self.start_new()
        self.folder = folder
        folder.was_asked_for = True

    def save_sometimes(self, chat: Callable[[], Conversation]) -> None:
        """Save if the last time was a while ago."""
        if self.saves and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save(chat())
