"""What was probably meant by the name of a command or an option that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmchat.errors import quoted
from mmchat.spelling import closest


def no_such_command(name: str, commands: Iterable[str]) -> str:
    """The message of a usage error; a model or its folder gets the command that asks it."""
    from mmchat.params import find_params, nearest_names

    message = f"No such command {quoted(name)}"
    if near := closest(name, commands, cutoff=0.6):
        return f"{message}; did you mean 'mmchat {near[0]}'?"
    is_model = find_params(name) is not None or Path(name).is_dir()
    models = [name] if is_model else nearest_names(name)
    if models:
        return f"{message}; to ask a model: mmchat generate {models[0]} --prompt TEXT"
    return message


def no_such_option(name: str, context: Any) -> str:
    """The message of a usage error, with the nearest option, or the other command that has it."""
    message = f"No such option: {name}"
    own = [option for option in _options(context.command) if option.startswith("--")]
    near = closest(name, own, cutoff=0.75)
    near = near or [option for option in own if len(name) > 3 and option.startswith(name)]
    if near:
        return f"{message}; did you mean {near[0]}?"
    others = getattr(getattr(context.parent, "command", None), "commands", {})
    having = [other for other, command in others.items() if name in _options(command)]
    if len(having) == 1:
        return f"{message}; 'mmchat {having[0]}' has it"
    return message


def _options(command: Any) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]
