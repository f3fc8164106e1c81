r"""Where commands are registered; help, completion and "did you mean" come from here.

A line `\name argument` is a command; so is `/name argument` where the word is a command's name and
no such file exists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.errors import UsageError
from mmchat.repl import paths
from mmchat.spelling import closest

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
    close = closest(word, known, cutoff=0.7 if text[0] == "/" else 0.5)
    if text[0] == "/" and (not close or paths.existing(text.strip())):
        return None
    advice = f"did you mean \\{close[0]}?" if close else "\\help lists the commands"
    raise UsageError(f"there is no command {text[0]}{word}; {advice}")
