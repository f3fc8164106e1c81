"""`mmchat chat`: a conversation about pictures, at a terminal or through pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.chats import chats_folder, choose_chat
from mmchat.cli.help_page import Command, plain_app
from mmchat.cli.model_choice import say_choice
from mmchat.cli.offer import find_or_offer
from mmchat.cli.option_groups import with_option_groups
from mmchat.cli.positional import Said
from mmchat.cli.prompt_input import (
    check_pictures,
    expect_pictures,
    picture_named,
    refuse_base64,
    refuse_text_only,
)
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.errors import INTERRUPTED_EXIT_CODE, UsageError
from mmchat.input_text import lines
from mmchat.loading.options import LoadOptions

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.catalog.source import ModelSource
    from mmchat.chat.session import ChatSession
    from mmchat.engine.sampling import SamplingParams
    from mmchat.loading.loader import LoadedModel
    from mmchat.repl.chat import Chat
    from mmchat.repl.loading import LoadingModel

CLIPBOARD = "clipboard"
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
ThumbnailMode = Literal["auto", "off", "kitty", "iterm2", "sixel", "blocks"]
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
    said: Said,
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
    images = [*said.pictures, *(images or [])]
    if continue_last and resume is not None:
        raise UsageError("--continue and --resume contradict each other; give one of them")
    if "-" in images:
        raise UsageError("'-i -' is for mmchat generate; in a chat stdin holds the questions")
    source = find_or_offer(model)
    if source.spec.chat_format == "base":
        from mmchat.catalog.known import answering_sibling

        instead = answering_sibling(source.spec) or "an Instruct model"
        raise UsageError(
            f"{source.spec.name} is a base model, which continues text and cannot chat; "
            f"{instead} can, and mmchat generate lets it continue"
        )
    if images:
        refuse_text_only(source.spec)
    check_pictures([image for image in images if image != CLIPBOARD])
    is_asked = resume == ""  # which of the chats
    saved = None if is_asked else _saved_chat(continue_last, resume)
    typed = console.is_terminal(sys.stdin)
    terminal = typed and console.draws(sys.stdout)
    if terminal:
        model_choice.check_address_space()
    else:
        model_choice.begin_loading(model, source)
    expect_pictures()
    if typed and not quiet:
        say_choice(model, source)
    if not quiet:
        console.note(*said.notes)
    if is_asked:
        saved = choose_chat(chats_folder())
    params = sampling.for_model(source.spec)
    keeps = not no_history and os.environ.get("MMCHAT_HISTORY", "1") != "0"
    keeps = keeps and (typed or saved is not None)
    question = said.question or ""
    opening = Opening(question, images, saved, sampling.chosen(), keeps, quiet)
    if terminal:
        code = _run_terminal(_loading(model, source, quiet), system, params, opening, thumbnails)
    else:
        with console.Stages(quiet=quiet) as stages:
            session = model_choice.load(model, source, stages).chat(system=system)
        code = _run_plain(session, params, opening)
    if code:
        raise typer.Exit(code)


chat_app = plain_app()
chat_app.command(cls=ChatCommand)(with_option_groups(chat))


def _saved_chat(continue_last: bool, resume: str | None) -> Path | None:
    from mmchat.repl import chats

    folder = chats_folder()
    if continue_last:
        return chats.latest_chat(folder)
    return None if resume is None else chats.find_chat(resume, folder)


def _loading(options: LoadOptions, source: ModelSource, quiet: bool) -> LoadingModel:
    """The model, which is loaded when the chat asks for it."""
    from mmchat.repl.loading import LoadingModel

    def load(loading: LoadingModel) -> Model:
        model_choice.begin_loading(options, source)
        return model_choice.load(options, source, loading)

    known = replace(
        options,
        alpha=model_choice.alpha_rule(options, source),
        text_only=options.text_only or source.spec.text_only,
    )
    stage = model_choice.first_stage(options)
    return LoadingModel(source.spec, known, stage, load, quiet=quiet)


@dataclass(frozen=True)
class Opening:
    """How a chat begins.

    question: asked at once, if there is one. given: settings of the command line, which overrule
    saved ones.
    """

    question: str
    images: list[str]
    saved: Path | None
    given: dict[str, Any]
    keeps: bool
    quiet: bool


def _run_plain(session: ChatSession, sampling: SamplingParams, opening: Opening) -> int:
    """Open the chat without a line editor; returns the exit code."""
    from mmchat.repl.chat import Chat
    from mmchat.repl.loop import run_plain
    from mmchat.repl.screen import PlainScreen

    screen = PlainScreen(
        console.write_out,
        lambda text: console.write_out(text, sys.stderr),
        out_columns=_columns(sys.stdout),
        err_columns=_columns(sys.stderr),
        quiet=opening.quiet,
    )
    chat = Chat(session, screen, sampling, chats_folder(), saves=opening.keeps)
    try:
        is_typed = console.is_terminal(sys.stdin)
        _begin(chat, opening, is_typed=is_typed)
        prompt = (lambda text: console.write_out(text, sys.stderr)) if is_typed else None
        with picture_named():
            typed = lines(sys.stdin.buffer, "stdin", refuse_base64)
            return run_plain(chat, chain(_first_line(opening), typed), prompt)
    finally:
        chat.keeper.start_new()


def _columns(stream: TextIO) -> Callable[[], int] | None:
    """What gives the columns of the terminal that shows `stream`, if there is one."""
    return partial(console.columns, stream) if console.is_terminal(stream) else None


def _run_terminal(
    loading: LoadingModel,
    system: str | None,
    sampling: SamplingParams,
    opening: Opening,
    thumbnails: ThumbnailMode,
) -> int:
    """Open the chat with a line editor, which is up before the model is; returns the exit code."""
    from mmchat.chat.session import ChatSession
    from mmchat.cli.app import report
    from mmchat.repl import thumbnail
    from mmchat.repl.answering import HardStop
    from mmchat.repl.chat import Chat
    from mmchat.repl.loop import run_terminal
    from mmchat.repl.terminal_probe import asked
    from mmchat.repl.terminal_screen import TerminalScreen, quiet_keys

    with asked(console.write_out, ask=thumbnails not in ("off", "blocks")) as answers:
        import prompt_toolkit  # noqa: F401 - while the terminal answers

        said = answers()
    drawing = thumbnail.choose(thumbnails, said)
    screen = TerminalScreen(
        console.write_out, console.buffer_console, drawing, color=console.uses_color()
    )

    def loaded() -> LoadedModel:
        """Called by the main thread."""
        if not loading.is_over:
            screen.wait(lambda: loading.stage, loading.get)
        chat.say_notes()
        return loading.get()

    chats, saves = chats_folder(), opening.keeps
    session = ChatSession(loaded, system)
    chat = Chat(session, screen, sampling, chats, saves=saves, loading=loading)
    history = chats.parent / "prompts" if saves else None
    code = 1
    try:
        with quiet_keys(_write_if_possible):
            _begin(chat, opening, is_typed=True)
            code = run_terminal(chat, screen, history, said, _first_line(opening))
    except HardStop:
        _leave_now(INTERRUPTED_EXIT_CODE)
    except SystemExit as leaving:  # SIGTERM or SIGHUP, perhaps while the model works
        _leave_now(leaving.code if isinstance(leaving.code, int) else 1)
    except Exception as error:
        if not loading.is_busy:
            raise
        code = report(error)
    if loading.is_busy:
        _leave_now(code)
    return code


def _first_line(opening: Opening) -> list[str]:
    """The question of the command line, which no command is made of and no picture is read from."""
    return [f"\\say {opening.question}"] if opening.question else []


def _begin(chat: Chat, opening: Opening, *, is_typed: bool) -> None:
    """Greet a person; resume and attach what the arguments ask for. Errors end the command."""
    from mmchat.repl import greeting, saving

    saved = opening.saved
    if is_typed and not opening.quiet:
        if saved is None and not opening.images and not opening.question:
            chat.screen.greet(greeting.LINES, greeting.to_try(chat.spec))
        else:
            chat.screen.note(greeting.LINES[-1])
    if saved is not None:
        chat.resume(saving.read(saved), saved, opening.given)
    if opening.images:
        chat.attach(opening.images)


def _write_if_possible(text: str) -> None:
    try:
        console.write_out(text)
    except (OSError, ValueError):  # the terminal is gone
        console.forget_streams()


def _leave_now(code: int) -> None:
    """End without waiting for the thread that loads or runs the model."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
