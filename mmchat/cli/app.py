"""The Typer application: registers the commands and turns errors into one line and an exit code.

Exit codes: 0 ok, 1 other error, 2 usage, 3 model or checkpoint, 4 picture, 5 memory, 6 network,
7 disk, 130 Ctrl-C, 141 the reader of stdout went away, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmchat.cli import console
from mmchat.cli.bench import bench
from mmchat.cli.chat import ChatCommand, chat
from mmchat.cli.chats import chats
from mmchat.cli.doctor import doctor
from mmchat.cli.download import download
from mmchat.cli.eval import eval_app
from mmchat.cli.export import export
from mmchat.cli.generate import generate
from mmchat.cli.help_page import App, Group
from mmchat.cli.inspect import inspect
from mmchat.cli.keeping import remove, where
from mmchat.cli.list_models import list_models
from mmchat.cli.options import Debug, debug_requested
from mmchat.cli.tiles import tiles
from mmchat.cli.verify import verify
from mmchat.cli.wrong_names import no_such_command, no_such_option
from mmchat.cli.wrong_values import explained
from mmchat.errors import DiskError, MmchatError, quoted

USAGE_EXIT_CODE = 2
MEMORY_EXIT_CODE = 5
DISK_EXIT_CODE = 7
CLOSED_PIPE_EXIT_CODE = 141
OUT_OF_MEMORY = "out of memory; try a smaller --max-seq-len or --dtype bfloat16"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


class ErrorReportingGroup(Group):
    """Ends every run with an exit code; only bugs show a traceback, or any error with --debug."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(no_such_command(name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        debug_requested.clear()
        console.set_color("auto")
        try:
            result = self.main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()
        except SystemExit as leaving:
            if isinstance(leaving.__context__, BrokenPipeError):
                result = _closed_pipe()
            else:
                raise
        except BrokenPipeError:
            result = _closed_pipe()
        except Exception as error:
            result = _report(error)
        sys.exit(result if isinstance(result, int) else 0)


def _closed_pipe() -> int:
    console.forget_streams()
    return CLOSED_PIPE_EXIT_CODE


def _report(error: Exception) -> int:
    """Write the error to stderr and return the exit code."""
    expected = _expected(error)
    if expected is None or debug_requested:
        console.write_safely("".join(traceback.format_exception(error)), sys.stderr)
    if expected is None:
        console.error("this is a bug in mmchat; please report it with the lines above")
        return 1
    message, code = expected
    console.error(message)
    return code


def _expected(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of an error that the user can act on; None for a bug."""
    if isinstance(error, MmchatError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return _wrong_usage(error), USAGE_EXIT_CODE
    if isinstance(error, typer.Abort):
        return "aborted", 1
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib, for ~name
        return "there is no such user; write the folder out in place of ~NAME", USAGE_EXIT_CODE
    if _is_out_of_memory(error):
        return OUT_OF_MEMORY, MEMORY_EXIT_CODE
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror}; free some space and run the same again", DISK_EXIT_CODE
    if isinstance(error, OSError) and error.errno in _NO_NAME and error.filename:
        return f"{quoted(error.filename)}: {error.strerror}; give another name", USAGE_EXIT_CODE
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return OUT_OF_MEMORY, MEMORY_EXIT_CODE
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Also what the loader of libraries and the starter of threads say without memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return (isinstance(error, ImportError) and "failed to map segment" in text) or (
        isinstance(error, RuntimeError) and "can't start new thread" in text
    )


def _wrong_usage(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if type(error) is typer.BadParameter:
        text = explained(error)
    elif option and context:
        text = no_such_option(option, context)
    else:
        text = error.format_message()
    message = " ".join(text.split()).rstrip(".")
    return f"{message} (see '{context.command_path if context else 'mmchat'} --help')"


app = App(
    name="mmchat",
    cls=ErrorReportingGroup,
    help="Chat about pictures with Llama 3.2 Vision (Mllama) on your own machine.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command(cls=ChatCommand)(chat)
app.command()(chats)
app.command(name="list")(list_models)
app.command()(download)
app.command()(where)
app.command()(verify)
app.command()(remove)
app.command()(export)
app.command()(inspect)
app.command()(tiles)
app.command()(doctor)
app.command()(bench)
app.add_typer(eval_app, name="eval")


def _print_version(asked: bool) -> None:
    if asked:
        import mmchat

        console.write_out(f"mmchat {mmchat.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
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
