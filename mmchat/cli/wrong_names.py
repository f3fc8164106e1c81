"""What was probably meant by the name of a command, an option or a model that does not exist."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "convert": "export --format hf", "ps": "doctor", "push": "export",
    "vision-plain": "chat", "plain": "chat", "interactive": "chat", "repl": "chat",
    "info": "inspect", "models": "list", "get": "download", "delete": "remove",
    "prompt": "generate", "ask": "generate", "benchmark": "bench",
    "settings": "config show", "browser": "serve --open", "web": "serve --open",
    "ui": "serve --open", "api": "serve", "start": "serve", "version": "--version",
}  # fmt: skip
_OPTIONS_ELSEWHERE = {  # of other programs
    "--max-tokens": "-n, --max-new-tokens", "--n-predict": "-n, --max-new-tokens",
    "--num-predict": "-n, --max-new-tokens", "--predict": "-n, --max-new-tokens",
    "--max-length": "-n, --max-new-tokens", "--temp": "-t, --temperature",
    "--ctx-size": "--max-seq-len", "--num-ctx": "--max-seq-len", "--max-model-len": "--max-seq-len",
    "--isq": "--quantize int4", "--bits": "--quantize int4", "--q4": "--quantize int4",
    "--q8": "--quantize int8", "--load-in-4bit": "--quantize int4",
    "--load-in-8bit": "--quantize int8", "--fp16": "--dtype float16", "--bf16": "--dtype bfloat16",
    "--gpu": "--device cuda", "--cuda": "--device cuda", "--n-gpu-layers": "--device cuda",
    "--ngl": "--device cuda", "--cpu": "--device cpu", "--model-id": "--model",
    "--checkpoint": "--checkpoint-path", "--ckpt-dir": "--checkpoint-path",
    "--tokenizer": "--tokenizer-path", "--mmproj": "--checkpoint-path, which holds the vision too",
    "--lora": "--adapter", "--lora-modules": "--adapter", "--lora-scaled": "--adapter PATH:SCALE",
    "--system-prompt": "--system", "--text": "--prompt", "--question": "--prompt",
    "--file": "--image-prompt", "--url": "--image-prompt", "--urls": "--image-prompt",
    "--attachment": "--image-prompt", "--picture": "--image-prompt",
    "--repeat-penalty": "--repetition-penalty", "--verbose-prompt": "--dry-run",
    "--model-type": "--params-path", "--continue-chat": "--continue",
}  # fmt: skip
_KINDS = ("-a", "--arch", "--architecture")
_QUESTION_WORDS = {"what", "that"}  # spelt nearly as "chat"


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


def is_slip(name: str, behind: Sequence[str], commands: Iterable[str]) -> bool:
    """Whether a first word that is no command was meant for one, or for a model, by a slip.

    A single bare word may be anything; beside other words it is the question, or begins it.
    """
    from mmchat.cli.positional import kind_of, mistyped

    if name in _ELSEWHERE:
        return True
    if kind_of(name) != "word":
        return False
    words = [word for word in behind if not word.startswith("-") or word == "-"]
    near = closest(name, commands, cutoff=0.7)
    is_said = bool(words) and name.lower() in _QUESTION_WORDS
    return bool(near and not is_said) or bool(mistyped(name)) or not words


def no_such_command(name: str, commands: Iterable[str]) -> str:
    """The message of a usage error; a model that is meant gets the command that asks it."""
    from mmchat.cli.positional import mistyped

    message = f"No such command {quoted(name)}"
    if meant := [_ELSEWHERE[name]] if name in _ELSEWHERE else closest(name, commands, cutoff=0.7):
        return f"{message}; did you mean 'mmchat {meant[0]}'?"
    if models := [near for near in mistyped(name) if near]:
        return f"{message}; to ask a model: mmchat generate {models[0]} --prompt TEXT"
    return f"{message}; if it is the question: mmchat generate --prompt {shlex.quote(name)}"


def no_such_option(error: Any, commands: Callable[[], Mapping[str, Any]]) -> str:
    """The message of Typer's error, with an argument so called, the nearest option, or the command.

    commands: gives all of them by name, each with its parameters.
    """
    name, message, own = error.option_name, error.message, error.ctx.command
    for argument in _arguments(own):
        if name in (f"--{argument.lower()}", f"-{argument[0].lower()}"):
            return f"{message}; {argument} stands alone: {error.ctx.command_path} {argument}"
    if name in ("-p", "--prompt") and error.ctx.info_name == "chat":
        return f"{message}; the question stands alone: {error.ctx.command_path} TEXT"
    if name in _OPTIONS_ELSEWHERE:
        return f"{message}; did you mean {_OPTIONS_ELSEWHERE[name]}?"
    if name in _KINDS:
        return f"{message}; the kind of model is read from its files: --model says which one"
    longs = [option for option in option_names(own) if option.startswith("--")]
    prefixed = (option for option in longs if len(name) > 3 and option.startswith(name))
    if near := [*closest(name, longs, cutoff=0.75), *prefixed]:
        return f"{message}; did you mean {near[0]}?"
    others = commands()
    having = [other for other, command in others.items() if name in option_names(command)]
    is_argument = any(name.lstrip("-").upper() in _arguments(one) for one in others.values())
    if len(having) == 1 and not is_argument:
        return f"{message}; 'mmchat {having[0]}' has it"
    return message


def no_such_value(message: str) -> str:
    """The message of Typer's error, with the dtype that another program's word stands for."""
    from mmchat.hardware.placement import DTYPES

    word = re.search(r"'([^']+)' is not one of .*float16", message)
    if word is None:
        return message
    name = word[1].lower()
    meant = DTYPES.get(name) or DTYPES.get(re.sub(r"^f(?=\d)", "fp", name))
    if meant is None and (bits := re.match(r"(?:q|int)([48])", name)):
        meant = f"--quantize int{bits[1]}"
    return f"{message.rstrip('.')}; did you mean {meant}?" if meant else message


def _arguments(command: Any) -> list[str]:
    """Their names as help shows them: MODEL, IMAGE."""
    found = (p.metavar or p.name for p in command.params if p.param_type_name == "argument")
    return [name.split("|")[0].upper() for name in found]


def option_names(command: Any) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]
