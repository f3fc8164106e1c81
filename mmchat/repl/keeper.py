"""Saves a chat as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mmchat.conversation import Conversation
from mmchat.errors import MmchatError, UsageError, quoted
from mmchat.repl import chats as places
from mmchat.repl import saving

SAVE_SECONDS = 1.5  # at most this much of an answer is lost in a crash


class Keeper:
    """Saves the chat as it goes; gives up with one note if the disk does not take it.

    chats: the folder of all chats. folder: the one of this chat, from its first save on. as_saved:
    a conversation with model and settings. saves: False saves only what `save_as` is asked for.
    """

    def __init__(
        self,
        chats: Path,
        as_saved: Callable[[Conversation], saving.SavedChat],
        note: Callable[[str], None],
        *,
        saves: bool,
    ) -> None:
        self.chats = chats
        self.saves = saves
        self.folder: places.ChatFolder | None = None
        self._as_saved = as_saved
        self._note = note
        self._saved_at = 0.0

    def start_new(self) -> None:
        """What comes next is another chat; this one is free for other programs."""
        if self.folder is not None:
            self.folder.close()
        self.folder = None

    def go_on(self, path: Path) -> None:
        """What comes next belongs to the chat at `path`, or to a copy if another program has it."""
        self.start_new()
        if not self.saves:
            return
        try:
            self.folder = places.hold(path)
            if self.folder is None:
                self.folder = places.new_chat(self.chats, path.name)
                name, copy = quoted(path.name), quoted(self.folder.path.name)
                self._note(f"{name} is open in another window; this one goes on as {copy}")
        except MmchatError as error:
            self._give_up(error)

    def save(self, chat: Conversation) -> None:
        if not self.saves:
            return
        self._saved_at = time.monotonic()
        try:
            if self.folder is None and chat.turns:
                self.folder = places.new_chat(self.chats)
            if self.folder is not None:
                self.folder.write(self._as_saved(chat))
        except MmchatError as error:
            self._give_up(error)

    def _give_up(self, error: MmchatError) -> None:
        self._note(f"this chat is no longer saved: {error}")
        self.start_new()
        self.saves = False

    def save_as(self, name: str, chat: Conversation) -> None:
        """Give the chat a name; it goes on under that. Raises UsageError, DiskError.

        A chat that somebody named before stays under that name, too.
        """
        before = self.folder
        if before is not None and before.path == self.chats / name:
            before.write(self._as_saved(chat))
            return
        if (self.chats / places.check_name(name)).exists():
            raise UsageError(
                f"there is a chat {quoted(name)} already; give another name, or remove it by"
                f" mmchat chats --remove {quoted(name)}"
            )
        folder = places.new_chat(self.chats, name)
        try:
            folder.write(self._as_saved(chat))
        except MmchatError:
            folder.remove()
            raise
        if before is not None and not before.is_named:
            before.remove()
        self.start_new()
        self.folder = folder

    def save_sometimes(self, chat: Callable[[], Conversation]) -> None:
        """Save if the last time was a while ago."""
        if self.saves and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save(chat())
