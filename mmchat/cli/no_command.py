"""`mmchat` with words or options but no command: which one is meant."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from mmchat.cli import console
from mmchat.cli.wrong_names import is_slip, option_names

_HELP_BEGINS_QUESTION = 3  # words, as in: help me with dog.jpg
_OWN = ("--help", "-h", "--version", "-V", "--install-completion", "--show-completion")


def with_command(
    args: list[str], commands: Collection[str], load: Callable[[str], Any]
) -> list[str]:
    """`args` with the command that is meant in front, also where they name none.

    On a terminal that is `chat`, unless an option is one of `generate` alone; in a pipe
    `generate`. `mmchat` alone stays as it is where stdin can hold nothing, and so does a first word
    that was meant for a command. load: gives a command with its parameters.
    """
    count = next((i for i, arg in enumerate(args) if arg != "--debug"), len(args))
    debug, rest = args[:count], args[count:]
    if not rest:
        if console.is_terminal(sys.stdin):
            return [*debug, "chat"]
        return [*debug, "generate"] if console.is_piped(False) else args
    first = rest[0]
    if first in commands or first.partition("=")[0] in _OWN:
        return args
    if first.startswith("-") and first != "-":
        has_command = any(arg in commands for arg in rest)
        at = _first_word(rest, load) if has_command else len(rest)
        if at < len(rest) and rest[at] in commands:
            return [*debug, rest[at], *rest[:at], *rest[at + 1 :]]
    elif first == "help" and (len(rest) < _HELP_BEGINS_QUESTION or rest[1] in commands):
        return [*debug, *rest[1:], "--help"]
    elif is_slip(first, rest[1:], commands):
        return args
    return [*debug, _meant(rest, load), *rest]


def _first_word(args: Sequence[str], load: Callable[[str], Any]) -> int:
    """Where the first word stands that is no option and no value of one; their count if none is."""
    parameters = [p for name in ("generate", "chat") for p in load(name).params]
    valued = {option for p in parameters if not getattr(p, "is_flag", False) for option in p.opts}
    is_value = False
    for at, arg in enumerate(args):
        if not is_value and not (arg.startswith("-") and arg != "-"):
            return at
        is_value = not is_value and arg in valued
    return len(args)


def _meant(args: list[str], load: Callable[[str], Any]) -> str:
    if not (console.is_terminal(sys.stdin) and console.is_terminal(sys.stdout)):
        return "generate"
    alone = set(option_names(load("generate"))) - set(option_names(load("chat")))
    given = {re.match(r"--[^=]+|-.|", arg)[0] for arg in args}  # type: ignore[index]
    return "generate" if given & alone else "chat"
