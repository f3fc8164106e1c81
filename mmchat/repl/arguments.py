"""What the arguments of several commands have in common."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.errors import UsageError, quoted
from mmchat.repl import paths, saving
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat


def number_of(argument: str, what: str, default: int | None = None) -> int:
    """Raises UsageError for what is none."""
    if not argument and default is not None:
        return default
    if not re.fullmatch(r"\d{1,6}", argument):
        raise UsageError(f"{what} is a number, not {quoted(argument)}")
    return int(argument)


def new_file(chat: Chat, name: str, kind: str) -> Path:
    """A path to write, checked before any work; what this chat wrote there may be replaced.

    Raises UsageError if another file has the name, DiskError.
    """
    path = Path(os.path.expanduser(paths.plain(name)))  # noqa: PTH111 - no error for no such ~user
    if kind == "png" and path.suffix.lower() != ".png":
        raise UsageError(f"the preview is a PNG; end the name in .png, not {quoted(path)}")
    is_folder = kind == "chat" and os.path.isdir(path)  # noqa: PTH112 - nor for a long name
    if not is_folder:
        atomic_file.check_writable(path)
    written = kind, path.resolve()
    if (path / saving.DOCUMENT if is_folder else path).is_file() and written not in chat.written:
        raise UsageError(f"{quoted(path, 300)} is there already; give another name")
    chat.written.add(written)
    return path
