"""Saves a chat as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mmchat.conversation import Conversation
from mmchat.errors import MmchatError
from mmchat.repl import saving

SAVE_SECONDS = 1.5  # at most this much of an answer is lost in a crash


class Keeper:
    """Saves the chat as it goes; gives up with one note if the disk does not take it.

    chats: where named chats are. as_saved: a conversation with model and settings. saves: False
    reads chats only.
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
        self.folder = saving.new_chat(chats) if saves else None
        self._as_saved = as_saved
        self._note = note
        self._saved_at = 0.0

    def start_new(self) -> None:
        """What comes next is another chat."""
        if self.folder is not None:
            self.folder = saving.new_chat(self.chats)

    def save(self, chat: Conversation) -> None:
        if self.folder is None:
            return
        self._saved_at = time.monotonic()
        try:
            if chat.turns or self.folder.exists():
                self.folder.write(self._as_saved(chat))
        except MmchatError as error:
            self._note(f"this chat is no longer saved: {error}")
            self.folder = None

    def save_sometimes(self, chat: Callable[[], Conversation]) -> None:
        """Save if the last time was a while ago."""
        if self.folder is not None and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save(chat())
