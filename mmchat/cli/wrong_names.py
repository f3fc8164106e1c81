"""What was probably meant by the name of a command, an option or a model that does not exist."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from mmchat.errors import UsageError, quoted
from mmchat.spelling import closest

# What is not a picture's place, and what the person who gave one there wanted.
_WITH_A_PICTURE = {
    "chat": "to chat about it: mmchat chat -i {0}",
    "inspect": "to see its tiles: mmchat tiles {0}",
    "tiles": "give it alone: mmchat tiles {0}",
}
_ASK = "to ask about it: mmchat generate -i {0} --prompt TEXT"
_ELSEWHERE = {  # commands of other programs for models
    "run": "chat", "pull": "download", "rm": "remove", "ls": "list", "show": "inspect",
    "convert": "export --format hf",
}  # fmt: skip


def model_name(context: typer.Context, name: str | None) -> str | None:
    """Callback of MODEL: a question or a picture in its place gets a hint; raises UsageError."""
    if name is None:
        return name
    from mmchat.repl.paths import looks_like_picture

    if looks_like_picture(name):
        hint = _WITH_A_PICTURE.get(context.info_name or "", _ASK).format(shlex.quote(name))
        raise UsageError(f"MODEL {quoted(name)} is a picture; {hint}")
    if not name.strip():
        raise UsageError("MODEL is empty; leave it out for the built-in model")
    is_path = os.path.exists(os.path.expanduser(name))  # noqa: PTH110, PTH111 - raise nothing
    if re.search(r"\s|\?$", name.strip()) and not is_path:
        hint = f"mmchat generate --prompt {shlex.quote(name)}"
        raise UsageError(f"MODEL {name!r} looks like a question; to ask it: {hint}")
    return name


def no_such_command(name: str, commands: Iterable[str]) -> str:
    """The message of a usage error; a model or its folder gets the command that asks it."""
    from mmchat.catalog.find import find_spec, nearest_names
    from mmchat.repl.paths import looks_like_picture

    message = f"No such command {quoted(name)}"
    if looks_like_picture(name):
        return f"{message}; {_ASK.format(shlex.quote(name))}"
    if meant := [_ELSEWHERE[name]] if name in _ELSEWHERE else closest(name, commands, cutoff=0.7):
        return f"{message}; did you mean 'mmchat {meant[0]}'?"
    is_model = find_spec(name) is not None or Path(name).is_dir()
    if models := [name] if is_model else nearest_names(name):
        return f"{message}; to ask a model: mmchat generate {models[0]} --prompt TEXT"
    return message


def no_such_option(error: Any, commands: Callable[[], Mapping[str, Any]]) -> str:
    """The message of Typer's error, with an argument so called, the nearest option, or the command.

    commands: gives all of them by name, each with its parameters.
    """
    name, message, own = error.option_name, error.message, error.ctx.command
    for argument in _arguments(own):
        if name in (f"--{argument.lower()}", f"-{argument[0].lower()}"):
            return f"{message}; {argument} stands alone: {error.ctx.command_path} {argument}"
    longs = [option for option in _options(own) if option.startswith("--")]
    prefixed = (option for option in longs if len(name) > 3 and option.startswith(name))
    if near := [*closest(name, longs, cutoff=0.75), *prefixed]:
        return f"{message}; did you mean {near[0]}?"
    others = commands()
    having = [other for other, command in others.items() if name in _options(command)]
    is_argument = any(name.lstrip("-").upper() in _arguments(one) for one in others.values())
    if len(having) == 1 and not is_argument:
        return f"{message}; 'mmchat {having[0]}' has it"
    return message


def _arguments(command: Any) -> list[str]:
    """Their names as help shows them: MODEL, IMAGE."""
    found = (p.metavar or p.name for p in command.params if p.param_type_name == "argument")
    return [name.split("|")[0].upper() for name in found]


def _options(command: Any) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]
