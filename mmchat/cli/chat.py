"""`mmchat chat`: a conversation about pictures, at a terminal or through pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from mmchat.cli import console, model_choice, options, prompt_input
from mmchat.cli.chats import chats_folder, choose_chat
from mmchat.cli.positional import Said
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

    Begin = Callable[[Chat], list[str]]

CLIPBOARD = "clipboard"
of_chat = partial(typer.Option, rich_help_panel="Chat")
ThumbnailMode = Literal["auto", "off", "kitty", "iterm2", "sixel", "blocks"]


def chat(
    said: Said,
    images: Annotated[
        list[str] | None,
        of_chat(
            *options.IMAGE_NAMES,
            metavar="PATH|URL",
            help="A picture for the first question; repeatable.",
        ),
    ] = None,
    system: options.System = None,
    continue_last: Annotated[
        bool, of_chat("--continue", "-c", help="Go on with the last chat.")
    ] = False,
    resume: Annotated[
        str | None,
        of_chat(metavar="[NAME]", help="Go on with a saved chat; without a name, choose one."),
    ] = None,
    no_history: Annotated[
        bool, of_chat(help="Keep nothing on disk (or set MMCHAT_HISTORY=0).")
    ] = False,
    thumbnails: Annotated[ThumbnailMode, of_chat(help="How attached pictures are shown.")] = "auto",
    *,
    sampling: SamplingOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    quiet: options.Quiet = False,
) -> None:
    """Chat about pictures. At a terminal \\help lists the commands; pipes get plain text.

    Drop a picture into the window, or type its path, and ask. Chats are kept; see --continue.
    """
    images = images or []
    if continue_last and resume is not None:
        raise UsageError("--continue and --resume contradict each other; give one of them")
    if "-" in images:
        raise UsageError("'-i -' is for mmchat generate; in a chat stdin holds the questions")
    source = model_choice.find_or_offer(model)
    prompt_input.check_model(source.spec, has_pictures=bool(images), chats=True)
    prompt_input.check_pictures([image for image in images if image != CLIPBOARD])
    from mmchat.repl import chats

    folder, saved = chats_folder(), None
    if continue_last:
        saved = chats.latest_chat(folder)
    elif resume:
        saved = chats.find_chat(resume, folder)
    typed = console.is_terminal(sys.stdin)
    terminal = typed and console.draws(sys.stdout)
    if terminal:
        model_choice.check_address_space()
    else:
        model_choice.begin_loading(model, source)
    prompt_input.expect_pictures()
    if typed:
        model_choice.say_choice(model, source)
    console.note(*said.notes)
    if resume == "":
        saved = choose_chat(folder)
    params = sampling.for_model(source.spec)
    keeps = not no_history and os.environ.get("MMCHAT_HISTORY", "1") != "0"
    keeps = keeps and (typed or saved is not None)
    greets = typed and not quiet
    given = sampling.chosen()  # which overrules what was saved
    begin = partial(_begin, said.question, images, saved, given, greets=greets)
    if terminal:
        loading = _loading(model, source, quiet)
        code = _run_terminal(loading, system, params, begin, keeps, thumbnails)
    else:
        with console.Stages() as stages:
            session = model_choice.load(model, source, stages).chat(system=system)
        code = _run_plain(session, params, begin, keeps, quiet)
    if code:
        raise typer.Exit(code)


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


def _run_plain(
    session: ChatSession, sampling: SamplingParams, begin: Begin, keeps: bool, quiet: bool
) -> int:
    """Open the chat without a line editor; returns the exit code."""
    from mmchat.repl.chat import Chat
    from mmchat.repl.loop import run_plain
    from mmchat.repl.screen import PlainScreen

    screen = PlainScreen(
        console.write_out,
        lambda text: console.write_out(text, sys.stderr),
        out_columns=_columns(sys.stdout),
        err_columns=_columns(sys.stderr),
        quiet=quiet,
    )
    chat = Chat(session, screen, sampling, chats_folder(), saves=keeps)
    try:
        first = begin(chat)
        is_typed = console.is_terminal(sys.stdin)
        prompt = (lambda text: console.write_out(text, sys.stderr)) if is_typed else None
        with prompt_input.picture_named():
            typed = lines(sys.stdin.buffer, "stdin", prompt_input.refuse_base64)
            return run_plain(chat, chain(first, typed), prompt)
    finally:
        chat.keeper.start_new()


def _columns(stream: TextIO) -> Callable[[], int] | None:
    """What gives the columns of the terminal that shows `stream`, if there is one."""
    return partial(console.columns, stream) if console.is_terminal(stream) else None


def _run_terminal(
    loading: LoadingModel,
    system: str | None,
    sampling: SamplingParams,
    begin: Begin,
    keeps: bool,
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

    chats = chats_folder()
    session = ChatSession(loaded, system)
    chat = Chat(session, screen, sampling, chats, saves=keeps, loading=loading)
    history = chats.parent / "prompts" if keeps else None
    code = 1
    try:
        with quiet_keys(_write_if_possible):
            code = run_terminal(chat, screen, history, said, begin(chat))
    except HardStop:
        _leave_now(INTERRUPTED_EXIT_CODE)
    except SystemExit as leaving:  # SIGTERM or SIGHUP, perhaps while the model works
        _leave_now(leaving.code if isinstance(leaving.code, int) else 1)
    except Exception as error:
        if not loading.is_busy:
            raise
        code = report(error)
    chat.keeper.start_new()  # which removes a chat in which nothing was asked
    if loading.is_busy:
        _leave_now(code)
    return code


def _begin(
    question: str | None,
    images: list[str],
    saved: Path | None,
    given: dict[str, Any],
    chat: Chat,
    *,
    greets: bool,
) -> list[str]:
    """Greet a person; resume and attach what the arguments ask for. Errors end the command.

    given: settings of the command line. Returns what is asked at once, if anything: the question,
    which no command is made of and no picture is read from.
    """
    from mmchat.repl import greeting, saving

    if greets and saved is None and not images and not question:
        chat.screen.greet(greeting.LINES, greeting.to_try(chat.spec))
    elif greets:
        chat.screen.note(greeting.LINES[-1])
    if saved is not None:
        chat.resume(saving.read(saved), saved, given)
    if images:
        chat.attach(images)
    return [f"\\say {question}"] if question else []


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
