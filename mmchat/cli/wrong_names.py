"""What was probably meant: by no command at all, or by the name of one, of an option or a model."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import typer

from mmchat.cli import console
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
_HELP_BEGINS_QUESTION = 3  # words, as in: help me with dog.jpg
_OWN = ("--help", "-h", "--version", "-V", "--install-completion", "--show-completion")
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
    elif _is_slip(first, rest[1:], commands):
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
    alone = set(_option_names(load("generate"))) - set(_option_names(load("chat")))
    given = {re.match(r"--[^=]+|-.|", arg)[0] for arg in args}  # type: ignore[index]
    return "generate" if given & alone else "chat"


def _is_slip(name: str, behind: Sequence[str], commands: Iterable[str]) -> bool:
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
    longs = [option for option in _option_names(own) if option.startswith("--")]
    prefixed = (option for option in longs if len(name) > 3 and option.startswith(name))
    if near := [*closest(name, longs, cutoff=0.75), *prefixed]:
        return f"{message}; did you mean {near[0]}?"
    others = commands()
    having = [other for other, command in others.items() if name in _option_names(command)]
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


def _option_names(command: Any) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]
