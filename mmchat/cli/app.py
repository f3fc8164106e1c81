"""The Typer application: finds the command and turns errors into one line and an exit code.

A command's module is imported when that command runs or completes, or its own help is asked.
Exit codes: 0 ok, 1 other error, 2 usage, 3 model or checkpoint, 4 picture, 5 memory, 6 network,
7 disk, 8 rows of a batch failed, 130 Ctrl-C, 141 the reader of stdout went away, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

import mmchat
from mmchat.cli import console
from mmchat.cli.help_page import WIDEST, Command, Group, plain_app
from mmchat.cli.options import Debug, debug_requested
from mmchat.cli.wrong_names import no_such_command, no_such_option, no_such_value, with_command
from mmchat.errors import (
    DiskError,
    MemoryError_,
    MmchatError,
    RankError,
    UsageError,
    not_permitted,
    quoted,
)

# name -> the first sentence of its help
COMMANDS = {
    "generate": "Answer a question about pictures, or about none.",
    "chat": "Chat about pictures.",
    "serve": "Serve a model: OpenAI's API, Ollama's, and a page for a browser.",
    "batch": "Ask about very many pictures; each answer is a line of JSON, and a rerun goes on.",
    "find": "Rank pictures by how likely the model finds something in them.",
    "chats": "List the chats that are kept, newest first, or remove some.",
    "list": "List the known models and what is present on disk.",
    "download": "Download a model into the Hugging Face cache, which other tools share.",
    "where": "Print the folder that a model is in.",
    "verify": "Check that a model's files are what the Hub, Meta or mmchat recorded, bit for bit.",
    "remove": "Remove what mmchat downloaded or exported of a model.",
    "export": (
        "Write a model so that it runs without its checkpoint; the folder's path goes to stdout."
    ),
    "inspect": "Show a model's architecture, sizes and memory needs; loads no weights.",
    "tiles": "Show how a picture is cut into tiles: its canvas, grid, size on it and token count.",
    "look": "Show where an answer looked: how strongly each word read each part of the pictures.",
    "doctor": "Show what this machine can run and how fast, and what is missing.",
    "bench": "Time a model: reading, pictures, and the tokens it writes after them.",
    "eval": "Measure a model's accuracy.",
    "config": "Show the defaults of model, quantize and device, and their file.",
}
# Where a command is, if not in the module and the function of its name
_PLACES = {
    "list": "list_models:list_models", "where": "keeping:where", "remove": "keeping:remove",
    "eval": "eval:eval_app", "config": "config:config_app",
}  # fmt: skip
_ALIASES = {"server": "serve"}
CLOSED_PIPE_EXIT_CODE = 141
OUT_OF_MEMORY = "out of memory; try a smaller --max-seq-len or --dtype bfloat16"
BUG = "this is a bug in mmchat; please report it with the lines above"


def load(name: str) -> Any:
    """The command `name` with its parameters; imports its module."""
    from mmchat.cli.option_groups import with_option_groups  # with all options of loading

    module, _, attribute = _PLACES.get(name, f"{name}:{name}").partition(":")
    found = getattr(import_module(f"mmchat.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        return get_command(found)
    single = plain_app()
    single.command(name, cls=Command)(with_option_groups(found))
    return get_command(single)


class MmchatGroup(Group):
    """Ends every run with an exit code; only bugs show a traceback, or any error with --debug."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for parameter in self.get_params(ctx):  # for None Typer would load its validator: 60 ms
            parameter.default = parameter.default or False
        if not ctx.resilient_parsing:
            args = with_command(args, {*COMMANDS, *_ALIASES}, load)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = _ALIASES.get(args[0], args[0])
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(no_such_command(name, COMMANDS))
        _, command, rest = super().resolve_command(ctx, [name, *args[1:]])
        return (name, load(name), rest) if command else (None, None, rest)

    def main(self, *args: Any, **settings: Any) -> Any:
        if not settings.get("standalone_mode", True):
            return super().main(*args, **settings)
        debug_requested.clear()
        console.set_color("auto")
        try:
            result = super().main(*args, **{**settings, "standalone_mode": False})
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as leaving:
            if not any(isinstance(e, BrokenPipeError) for e in (leaving, leaving.__context__)):
                raise
            console.forget_streams()
            result = CLOSED_PIPE_EXIT_CODE
        except Exception as error:
            result = report(error)
            try:
                sys.stdout.flush()
            except (OSError, ValueError):  # Python would try again at the end, and exit with 120
                console.forget(sys.stdout)
            if isinstance(error, RankError):  # threads of torch may wait for those that are gone
                sys.stderr.flush()
                os._exit(result)
        finally:
            console.set_quiet(False)  # --quiet is of one run
        sys.exit(result if isinstance(result, int) else 0)


def report(error: Exception) -> int:
    """Write the error to stderr and return the exit code."""
    expected = _expected(error)
    if expected is None or debug_requested:
        import traceback

        console.write_safely("".join(traceback.format_exception(error)), sys.stderr)
    message, code = expected or (BUG, 1)
    console.error(message)
    return code


def _expected(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of an error that the user can act on; None for a bug."""
    if isinstance(error, MmchatError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return _wrong_usage(error), UsageError.exit_code
    if isinstance(error, typer.Abort):
        return "aborted", 1
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib, for ~name
        return "there is no such user; write the folder out in place of ~NAME", UsageError.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}; free some space and run the same again", DiskError.exit_code
    if isinstance(error, PermissionError) and error.filename:
        return not_permitted(error), DiskError.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        named = f"{quoted(error.filename)}: {error.strerror}"
        return f"{named}; give another name", UsageError.exit_code
    return (OUT_OF_MEMORY, MemoryError_.exit_code) if _is_out_of_memory(error) else None


def _is_out_of_memory(error: Exception) -> bool:
    """Also what the loader of libraries and the starter of threads say without memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or getattr(error, "errno", None) == errno.ENOMEM
        or "failed to map segment" in str(error)
        or "can't start new thread" in str(error)
    )


def _wrong_usage(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    if hasattr(error, "possibilities"):  # as only the error of an unknown option has
        text = no_such_option(error, lambda: {name: load(name) for name in COMMANDS})
    else:
        text = no_such_value(error.format_message())
        if missing := re.match(r"Missing command|No such command '[^']*'(?=\.)", text):
            text = f"{missing[0]}; there is {' and '.join(context.command.commands)}"
    if faults := getattr(error.__cause__, "errors", None):  # the validator names no value
        value = quoted(faults()[0]["input"])
        text = text.replace("Value error, ", "").replace("Input should", f"{value} should")
    message = " ".join(text.split()).rstrip(".")
    return f"{message} (see '{context.command_path if context else 'mmchat'} --help')"


app = plain_app(
    name="mmchat",
    cls=MmchatGroup,
    add_completion=True,
    help=(
        "Chat about pictures with Llama 3.2 Vision (Mllama) on your own machine."
        " Without a command: chat on a terminal, generate in a pipe."
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
    pretty_exceptions_enable=False,
)
for _name, _help in COMMANDS.items():  # in place of each, until it is loaded, its line of help
    app.command(_name, short_help=_help)(lambda: None)


def _print_version(asked: bool) -> None:
    if asked:
        console.write_out(f"mmchat {mmchat.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "-V", "--version", callback=_print_version, is_eager=True, help="Show the version."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    if context.invoked_subcommand is None:
        console.write_out(context.get_help() + "\n")
        return
    try:
        Path.cwd()
    except FileNotFoundError:  # torch's libraries abort the process there
        raise DiskError("the folder that you are in was removed; change to another") from None
