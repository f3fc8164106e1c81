"""`mmchat chat`: a conversation about pictures, at a terminal or through pipes."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat.cli import console, options
from mmchat.cli.model_choice import ModelChoice, begin_loading, check_name, say_choice
from mmchat.cli.offer import find_or_offer
from mmchat.cli.option_groups import with_option_groups
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.errors import UsageError

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat
    from mmchat.sampling import SamplingParams
    from mmchat.session import ChatSession

HANGUP_EXIT_CODE = 129
INTERRUPTED_EXIT_CODE = 130
CHAT = "Chat"

FirstImages = Annotated[
    list[str] | None,
    typer.Option(
        "-i",
        "--image-prompt",
        "--image-prompts",
        "--image",
        metavar="PATH|URL",
        help="A picture for the first question; repeatable.",
        rich_help_panel=CHAT,
    ),
]
Continue = Annotated[
    bool,
    typer.Option("--continue", "-c", help="Go on with the last chat.", rich_help_panel=CHAT),
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="NAME", help="Go on with a saved chat.", rich_help_panel=CHAT),
]
NoHistory = Annotated[
    bool,
    typer.Option(
        "--no-history",
        help="Keep nothing on disk (or set MMCHAT_HISTORY=0).",
        rich_help_panel=CHAT,
    ),
]
Thumbnails = Annotated[
    Literal["auto", "off", "kitty", "sixel", "blocks"],
    typer.Option(help="How attached pictures are shown.", rich_help_panel=CHAT),
]


@with_option_groups
def chat(
    images: FirstImages = None,
    system: options.System = None,
    continue_last: Continue = False,
    resume: Resume = None,
    no_history: NoHistory = False,
    thumbnails: Thumbnails = "auto",
    *,
    sampling: SamplingOptions,
    choice: ModelChoice,
    offline: options.Offline = False,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
    debug: options.Debug = False,
) -> None:
    """Chat about pictures. At a terminal \\help lists the commands; pipes get plain text.

    Drop a picture into the window, or type its path, and ask. Chats are kept; see --continue.
    """
    if continue_last and resume:
        raise UsageError("--continue and --resume contradict each other; give one of them")
    if "-" in (images or []):
        raise UsageError("'-i -' is for mmchat generate; in a chat stdin holds the questions")
    check_name(choice.name)
    source = find_or_offer(choice)
    if source.params.chat_format == "base":
        raise UsageError(
            f"{source.params.name} is a base model, which continues text and cannot chat; "
            "use its Instruct sibling, or mmchat generate"
        )
    begin_loading(source)
    terminal = console.is_terminal(sys.stdin) and console.draws(sys.stdout)
    if terminal and not quiet:
        say_choice(choice, source)
    saved = _saved_chat(continue_last, resume)
    way = _thumbnail_way(thumbnails) if terminal else "off"
    with _typing_ahead(terminal), console.Stages(quiet=quiet) as stages:
        session = choice.load(stages).chat(system=system)
    params = sampling.for_model(source.params)
    keeps = not no_history and os.environ.get("MMCHAT_HISTORY", "1") != "0"
    keeps = keeps and (terminal or saved is not None)
    code = _run(session, params, images or [], saved, terminal=terminal, way=way, keeps=keeps)
    if code:
        raise typer.Exit(code)


def _state_folder() -> Path:
    """Where chats and typed lines are kept."""
    import platformdirs

    return platformdirs.user_state_path("mmchat", appauthor=False)


def _saved_chat(continue_last: bool, resume: str | None) -> Path | None:
    from mmchat.repl import saving

    chats = _state_folder() / "chats"
    if continue_last:
        return saving.latest_chat(chats)
    return saving.find_chat(resume, chats) if resume else None


def _thumbnail_way(mode: Literal["auto", "off", "kitty", "sixel", "blocks"]) -> str:
    from mmchat.repl import thumbnail

    return thumbnail.choose(mode)


def _typing_ahead(terminal: bool) -> AbstractContextManager[None]:
    """What is typed while the model loads waits for the prompt."""
    if not terminal:
        return nullcontext()
    from mmchat.repl.terminal_screen import quiet_keys

    return quiet_keys()


def _make_console(file: io.StringIO, columns: int) -> Any:
    return console.buffer_console(file, columns)


def _run(
    session: ChatSession,
    sampling: SamplingParams,
    images: list[str],
    saved: Path | None,
    *,
    terminal: bool,
    way: str,
    keeps: bool,
) -> int:
    """Open the chat on the right kind of screen; returns the exit code."""
    from mmchat.repl.chat import Chat
    from mmchat.repl.loop import run_plain
    from mmchat.repl.screen import PlainScreen

    chats = _state_folder() / "chats"
    if not terminal:
        screen = PlainScreen(
            console.write_out,
            lambda text: console.write_out(text, sys.stderr),
            out_is_terminal=console.is_terminal(sys.stdout),
        )
        chat = Chat(session, screen, sampling, chats, saves=keeps)
        _begin(chat, images, saved)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        return run_plain(chat, sys.stdin)
    return _run_terminal(session, sampling, images, saved, chats, way=way, keeps=keeps)


def _run_terminal(
    session: ChatSession,
    sampling: SamplingParams,
    images: list[str],
    saved: Path | None,
    chats: Path,
    *,
    way: str,
    keeps: bool,
) -> int:
    from mmchat.repl.answering import HardStop
    from mmchat.repl.chat import Chat
    from mmchat.repl.loop import run_terminal
    from mmchat.repl.terminal_screen import TerminalScreen, sane_terminal

    screen = TerminalScreen(console.write_out, _make_console, way, color=console.uses_color())
    chat = Chat(session, screen, sampling, chats, saves=keeps)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, _exit_on_hangup)
    code = 1
    try:
        with sane_terminal(_write_if_possible):
            screen.note("\\help lists the commands, Ctrl-D leaves")
            _begin(chat, images, saved)
            code = run_terminal(chat, screen, chats.parent / "prompts" if keeps else None)
    except HardStop:
        _leave_now(INTERRUPTED_EXIT_CODE)
    except SystemExit as leaving:  # SIGTERM or SIGHUP, perhaps while the model works
        _leave_now(leaving.code if isinstance(leaving.code, int) else 1)
    return code


def _begin(chat: Chat, images: list[str], saved: Path | None) -> None:
    """Resume and attach what the arguments ask for; errors end the command."""
    from mmchat.repl import saving

    if saved is not None:
        chat.resume(saving.read(saved), saved if saved.is_dir() else None)
    if images:
        chat.attach(images)


def _write_if_possible(text: str) -> None:
    try:
        console.write_out(text)
    except (OSError, ValueError):  # the terminal is gone
        console.forget_stdout()


def _leave_now(code: int) -> None:
    """End without waiting for the thread that runs the model."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_on_hangup(_signal_number: int, _frame: object) -> None:
    sys.exit(HANGUP_EXIT_CODE)
