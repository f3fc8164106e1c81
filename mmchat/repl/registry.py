r"""Where commands are registered, and how their arguments are read.

Help, completion and "did you mean" come from here.

A line `\name argument` is a command; so is `/name argument` where the word is a command's name and
no such file exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.errors import UsageError, quoted
from mmchat.repl import paths, saving
from mmchat.spelling import closest
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat

Run = Callable[["Chat", str], None]
Complete = Callable[["Chat", str], Iterable[str]]
_COMMAND = re.compile(r"[\\/]([A-Za-z?]+)(?:\s+|$)")


@dataclass(frozen=True)
class Command:
    """usage: the argument as help shows it. complete: candidates for an argument begun; "paths"
    stands for files."""

    name: str
    usage: str
    help: str
    run: Run
    complete: Complete | str | None = None
    aliases: tuple[str, ...] = ()


BARE = frozenset({"exit", "quit", "help"})  # alone on a line, commands without the backslash, too
COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    usage: str = "",
    *,
    complete: Complete | str | None = None,
    aliases: tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    """Register a function; the first line of its docstring is the help."""

    def register(run: Run) -> Run:
        text = (run.__doc__ or "").strip().split("\n")[0].rstrip(".")
        COMMANDS[name] = Command(name, usage, text, run, complete, aliases)
        return run

    return register


def names() -> dict[str, Command]:
    """Every word that is a command, with its aliases."""
    words = {alias: found for found in COMMANDS.values() for alias in found.aliases}
    return {**COMMANDS, **words}


def find(line: str) -> tuple[Command, str] | None:
    r"""The command of a line and its argument; None if the line is a message.

    Raises UsageError for an unknown `\word`, or an argument that the command does not take.
    """
    text = line.lstrip()
    if text.strip().lower() in BARE:
        text = "\\" + text.strip()
    if text.strip() == "\\":
        raise UsageError("\\ begins a command; \\help lists them")
    match = _COMMAND.match(text)
    if match is None:
        return None
    word = match[1].lower()
    known = names()
    if word in known:
        if text[0] == "/" and paths.existing(text.split()[0]):
            return None
        argument = text[match.end() :].strip()
        if argument and not known[word].usage:
            raise UsageError(f"\\{known[word].name} takes no argument; nothing was done")
        return known[word], argument
    close = closest(word, known, cutoff=0.7)
    if text[0] == "/" and (not close or paths.existing(text.strip())):
        return None
    advice = f"did you mean \\{close[0]}?" if close else "\\help lists the commands"
    raise UsageError(f"there is no command {text[0]}{word}; {advice}")


def number_of(argument: str, what: str, default: int | None = None) -> int:
    """Raises UsageError for what is none."""
    if not argument and default is not None:
        return default
    if not re.fullmatch(r"[0-9]+", argument):
        raise UsageError(f"{what} is a number, not {quoted(argument)}")
    if len(argument) > 6:
        raise UsageError(f"{what} is a number of 6 digits at most, not {quoted(argument)}")
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


def write(chat: Chat, file: Path, content: bytes) -> None:
    """Write a file for the user alone, and say so. Raises DiskError."""
    atomic_file.write_bytes(file, content, mode=saving.PRIVATE_FILE)
    chat.screen.note(f"wrote {str(file)!r}")
