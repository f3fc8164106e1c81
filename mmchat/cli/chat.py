"""`mmchat chat`: a conversation about pictures, at a terminal or through pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.chats import chats_folder, choose_chat
from mmchat.cli.help_page import Command, plain_app
from mmchat.cli.interrupts import INTERRUPTED_EXIT_CODE
from mmchat.cli.model_choice import say_choice
from mmchat.cli.offer import find_or_offer
from mmchat.cli.option_groups import with_option_groups
from mmchat.cli.prompt_input import expect_pictures, picture_named, refuse_base64
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.errors import UsageError
from mmchat.input_text import lines
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat
    from mmchat.repl.terminal_probe import Answers

of_chat = partial(typer.Option, rich_help_panel="Chat")
FirstImages = Annotated[
    list[str] | None,
    of_chat(
        *options.IMAGE_NAMES,
        metavar="PATH|URL",
        help="A picture for the first question; repeatable.",
    ),
]
Continue = Annotated[bool, of_chat("--continue", "-c", help="Go on with the last chat.")]
Resume = Annotated[
    str | None,
    of_chat(metavar="[NAME]", help="Go on with a saved chat; without a name, choose one."),
]
NoHistory = Annotated[
    bool, of_chat("--no-history", help="Keep nothing on disk (or set MMCHAT_HISTORY=0).")
]
ThumbnailMode = Literal["auto", "off", "kitty", "sixel", "blocks"]
Thumbnails = Annotated[ThumbnailMode, of_chat(help="How attached pictures are shown.")]


class ChatCommand(Command):
    """Takes `--resume` without a name, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pairs = zip(args, [*args[1:], "-"], strict=False)
        bare = "--resume"
        return super().parse_args(
            ctx, [f"{a}=" if a == bare and after.startswith("-") else a for a, after in pairs]
        )


def chat(
    images: FirstImages = None,
    system: options.System = None,
    continue_last: Continue = False,
    resume: Resume = None,
    no_history: NoHistory = False,
    thumbnails: Thumbnails = "auto",
    *,
    sampling: SamplingOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    quiet: options.Quiet = False,
) -> None:
    """Chat about pictures. At a terminal \\help lists the commands; pipes get plain text.

    Drop a picture into the window, or type its path, and ask. Chats are kept; see --continue.
    """
    if continue_last and resume is not None:
        raise UsageError("--continue and --resume contradict each other; give one of them")
    if "-" in (images or []):
        raise UsageError("'-i -' is for mmchat generate; in a chat stdin holds the questions")
    source = find_or_offer(model)
    if source.spec.chat_format == "base":
        raise UsageError(
            f"{source.spec.name} is a base model, which continues text and cannot chat; "
            "use its Instruct sibling, or mmchat generate"
        )
    model_choice.begin_loading(source)
    expect_pictures()
    terminal = console.is_terminal(sys.stdin) and console.draws(sys.stdout)
    if terminal and not quiet:
        say_choice(model, source)
    saved = _saved_chat(continue_last, resume)
    with _asked(thumbnails, terminal) as answers:
        with console.Stages(quiet=quiet) as stages:
            session = model_choice.load(model, source, stages).chat(system=system)
        said = answers()
    params = sampling.for_model(source.spec)
    keeps = not no_history and os.environ.get("MMCHAT_HISTORY", "1") != "0"
    keeps = keeps and (console.is_terminal(sys.stdin) or saved is not None)
    from mmchat.repl import saving
    from mmchat.repl.chat import Chat

    def begin(opened: Chat) -> None:
        """Resume and attach what the arguments ask for; errors end the command."""
        if saved is not None:
            opened.resume(saving.read(saved), saved, sampling.chosen())
        if images:
            opened.attach(images)

    make = partial(Chat, session, sampling=params, chats=chats_folder(), saves=keeps)
    if said is None:
        code = _run_plain(make, begin, quiet)
    else:
        code = _run_terminal(make, begin, thumbnails, said)
    if code:
        raise typer.Exit(code)


chat_app = plain_app()
chat_app.command(cls=ChatCommand)(with_option_groups(chat))


def _saved_chat(continue_last: bool, resume: str | None) -> Path | None:
    from mmchat.repl import chats

    folder = chats_folder()
    if continue_last:
        return chats.latest_chat(folder)
    if resume is None:
        return None
    return chats.find_chat(resume, folder) if resume else choose_chat(folder)


def _asked(mode: ThumbnailMode, terminal: bool) -> AbstractContextManager[Any]:
    """Ask the terminal what it can show; what is typed while the model loads is not lost."""
    if not terminal:
        return nullcontext(lambda: None)
    from mmchat.repl.terminal_probe import asked

    return asked(console.write_out, ask=mode in ("auto", "sixel", "kitty"))


def _run_plain(make: Callable[[Any], Chat], begin: Callable[[Chat], None], quiet: bool) -> int:
    """Open the chat for pipes; returns the exit code."""
    from mmchat.repl.loop import run_plain
    from mmchat.repl.screen import PlainScreen

    screen = PlainScreen(
        console.write_out,
        lambda text: console.write_out(text, sys.stderr),
        out_is_terminal=console.is_terminal(sys.stdout),
        quiet=quiet,
    )
    chat = make(screen)
    try:
        begin(chat)
        is_typed = console.is_terminal(sys.stdin)
        prompt = (lambda text: console.write_out(text, sys.stderr)) if is_typed else None
        with picture_named():
            return run_plain(chat, lines(sys.stdin.buffer, "stdin", refuse_base64), prompt)
    finally:
        chat.keeper.start_new()


def _run_terminal(
    make: Callable[[Any], Chat],
    begin: Callable[[Chat], None],
    thumbnails: ThumbnailMode,
    answers: Answers,
) -> int:
    """Open the chat at a terminal; returns the exit code."""
    from mmchat.repl import thumbnail
    from mmchat.repl.answering import HardStop
    from mmchat.repl.loop import run_terminal
    from mmchat.repl.terminal_screen import TerminalScreen, quiet_keys, sane_terminal

    drawing = thumbnail.choose(thumbnails, answers)
    screen = TerminalScreen(
        console.write_out, console.buffer_console, drawing, color=console.uses_color()
    )
    chat = make(screen)
    history = chat.keeper.chats.parent / "prompts" if chat.keeper.saves else None
    code = 1
    try:
        with sane_terminal(_write_if_possible), quiet_keys():
            screen.note("\\help lists the commands, Ctrl-D leaves")
            begin(chat)
            code = run_terminal(chat, screen, history, answers)
    except HardStop:
        _leave_now(INTERRUPTED_EXIT_CODE)
    except SystemExit as leaving:  # SIGTERM or SIGHUP, perhaps while the model works
        _leave_now(leaving.code if isinstance(leaving.code, int) else 1)
    return code


def _write_if_possible(text: str) -> None:
    try:
        console.write_out(text)
    except (OSError, ValueError):  # the terminal is gone
        console.forget_streams()


def _leave_now(code: int) -> None:
    """End without waiting for the thread that runs the model."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
