"""Reads lines for the chat: plainly from a pipe, or with an editor from a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.errors import INTERRUPTED_EXIT_CODE, MmchatError
from mmchat.repl import paths, saving
from mmchat.repl.chat import Chat, Leave
from mmchat.repl.terminal_probe import ANSWER, Answers
from mmchat.repl.toolbar import toolbar_text
from mmchat.storage import atomic_file

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.key_binding.key_processor import KeyPress

    from mmchat.repl.loading import LoadingModel
    from mmchat.repl.terminal_screen import TerminalScreen

PROMPT = "> "
CONTINUED = "  "
LEAVE_SECONDS = 3.0  # two Ctrl-C within this time leave
ESCAPE_SECONDS = 0.05  # what comes later than this after Esc is no key with Alt
LOOK_SECONDS = 0.1  # how often the prompt looks how far loading is


def run_plain(chat: Chat, lines: Iterable[str], prompt: Callable[[str], None] | None = None) -> int:
    """One message or command each. The exit code of the first line that failed, else 0.

    prompt: shows a text to the person who types the lines, if there is one.
    """
    prompt = prompt or (lambda _: None)
    try:
        prompt(PROMPT)
        for line in lines:
            chat.line(line)
            prompt(PROMPT)
        prompt("\n")
    except Leave:
        pass
    except KeyboardInterrupt:
        prompt("\n")
        raise
    _leave(chat)
    return chat.first_error


def run_terminal(
    chat: Chat,
    screen: TerminalScreen,
    history_file: Path | None,
    answers: Answers,
    first: Iterable[str] = (),
) -> int:
    """Until the user leaves. 0, or 130 after Ctrl-C twice at an empty prompt, once while loading.

    A model that is not there yet is loaded from the first prompt on; raises what that raises.
    answers: of the terminal, with the keys that were typed before there was a prompt. first: lines
    to begin with, which are shown as if they were typed.
    """
    prompt = Prompt(chat, screen, history_file)
    prompt.type_ahead(answers)
    screen.ask = prompt.ask
    coming = deque(first)
    code = None
    while code is None:
        try:
            if coming:
                line = coming.popleft()
                screen.note(PROMPT + line.removeprefix("\\say "))
            else:
                line = prompt.read()
            chat.line(line)
        except (Leave, EOFError):
            code = 0
        except LeftByCtrlC:
            code = INTERRUPTED_EXIT_CODE
        except KeyboardInterrupt:  # it was to stop what had just ended: nobody wants to leave
            continue
    _leave(chat)
    return code


def _leave(chat: Chat) -> None:
    if chat.keeper.saves:
        chat.say_unasked()


class LeftByCtrlC(KeyboardInterrupt):
    """Ctrl-C was pressed at the prompt, to leave."""


class Prompt:
    """The line editor."""

    def __init__(self, chat: Chat, screen: TerminalScreen, history_file: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.lexers import SimpleLexer
        from prompt_toolkit.output import ColorDepth
        from prompt_toolkit.styles import Style

        from mmchat.repl.completion import ChatCompleter

        self._chat = chat
        self._screen = screen
        self._pressed_at = float("-inf")
        self._is_editing = False
        self._session: PromptSession[str] = PromptSession(
            history=open_history(history_file, screen.to_try),
            auto_suggest=AutoSuggestFromHistory(),
            completer=ChatCompleter(chat),
            complete_while_typing=Condition(
                lambda: self._session.default_buffer.text.startswith("\\")
            ),
            complete_in_thread=True,
            multiline=True,
            prompt_continuation=CONTINUED,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            key_bindings=self._keys(),
            bottom_toolbar=self._toolbar,
            reserve_space_for_menu=4,
            lexer=SimpleLexer("class:question"),
            color_depth=None if screen.color else ColorDepth.MONOCHROME,
            # Dim, not grey: some themes give the background that very grey.
            style=Style.from_dict(
                {
                    "bottom-toolbar": "noreverse dim",
                    "sign": "ansimagenta bold",
                    "question": "ansimagenta",
                }
            ),
        )
        self._session.app.ttimeoutlen = ESCAPE_SECONDS

    def read(self) -> str:
        """The next message or command.

        Raises EOFError (Ctrl-D), LeftByCtrlC and what loading the model raises.
        """
        if self._chat.loading and self._chat.loading.error:
            raise self._chat.loading.error
        self._pressed_at = float("-inf")
        self._chat.say_notes()
        self._screen.leave_blank()
        return self._session.prompt([("class:sign", PROMPT)], pre_run=self._follow_loading)

    def _follow_loading(self) -> None:
        if self._chat.loading and self._chat.is_loading:
            self._session.app.create_background_task(self._while_loading(self._chat.loading))

    async def _while_loading(self, loading: LoadingModel) -> None:
        """Show how far it is; where it fails, the prompt ends."""
        import asyncio

        from prompt_toolkit.application import run_in_terminal

        loading.begin()  # with the prompt drawn, which an import of torch at once would slow
        app, shown, is_over = self._session.app, "", False
        while not is_over:
            await asyncio.sleep(LOOK_SECONDS)
            is_over = loading.is_over
            if loading.notes:
                await run_in_terminal(self._say_notes)
            if loading.error is not None and not app.is_done:
                app.exit(exception=loading.error, style="class:aborting")
            elif is_over or shown != loading.stage:
                shown = loading.stage
                app.invalidate()

    def _say_notes(self) -> None:
        self._chat.say_notes()
        self._screen.leave_blank()

    def ask(self, prompt: str, default: str) -> str | None:
        """A line for another purpose; None after Ctrl-C or Ctrl-D. With `default` to edit it."""
        from prompt_toolkit import PromptSession

        self._is_editing = bool(default)
        session = self._session if default else PromptSession[str]()
        try:
            return session.prompt(prompt, default=default)
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            self._is_editing = False

    def type_ahead(self, answers: Answers) -> None:
        """What was typed before counts as typed at the prompt; late answers of the terminal do not.

        Works with the input of POSIX terminals; any other one is left as it is.
        """
        from prompt_toolkit.input.typeahead import store_typeahead
        from prompt_toolkit.input.vt100 import Vt100Input
        from prompt_toolkit.input.vt100_parser import Vt100Parser

        if answers.typed:
            keys: list[KeyPress] = []
            Vt100Parser(keys.append).feed_and_flush(answers.typed)
            store_typeahead(self._session.input, keys)
        if not answers.complete and isinstance(self._session.input, Vt100Input):
            parser = self._session.input.vt100_parser
            feed = parser.feed
            parser.feed = lambda data: feed(ANSWER.sub("", data))

    def _toolbar(self) -> str:
        columns = self._screen.size()[0]
        if self._leaves_next():
            line = "Ctrl-C again leaves, Ctrl-D too"
        elif self._is_editing:
            line = "Enter asks this in place of the last question; Esc or Ctrl-C keeps the old one"
        else:
            line = toolbar_text(self._chat, columns)
        # The rule is here, below the cursor: above it a window made narrower would keep a copy.
        return "─" * columns + "\n" + line

    def _leaves_next(self) -> bool:
        """Whether another Ctrl-C leaves."""
        return time.monotonic() - self._pressed_at < LEAVE_SECONDS

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.application import run_in_terminal
        from prompt_toolkit.filters import Condition, is_searching
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys

        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("tab")
        def _complete(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.complete_state is None:
                buffer.start_completion(insert_common_part=True)
            elif len(buffer.complete_state.completions) == 1:  # taken; a folder shows what is in it
                buffer.apply_completion(buffer.complete_state.completions[0])
                buffer.start_completion()
            else:
                buffer.complete_next()

        @keys.add("escape", "enter")
        @keys.add("c-j")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        def leave(event: KeyPressEvent) -> None:
            event.app.exit(exception=LeftByCtrlC, style="class:aborting")

        # Keys with Alt, as Alt-Enter, begin with Esc too, and the rest of them comes with it.
        is_alone = Condition(lambda: not self._session.app.key_processor.input_queue)
        is_editing = Condition(lambda: self._is_editing)
        keys.add("escape", filter=is_editing & ~is_searching, eager=is_alone)(leave)

        @keys.add("c-c", filter=~is_searching)
        @keys.add("<sigint>")
        def _interrupt(event: KeyPressEvent) -> None:
            if self._is_editing:
                leave(event)
            elif event.current_buffer.text:
                event.current_buffer.reset()
                self._pressed_at = float("-inf")
            elif self._chat.is_loading or self._leaves_next():
                leave(event)
            else:
                self._pressed_at = time.monotonic()

        @keys.add(Keys.BracketedPaste)
        def _paste(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            sources = dropped_pictures(text)
            if sources and not event.current_buffer.text.startswith(("\\", "/")):
                run_in_terminal(lambda: self._attach(sources))  # above the prompt
            else:
                event.current_buffer.insert_text(text)

        return keys

    def _attach(self, sources: tuple[str, ...]) -> None:
        try:
            self._chat.attach(sources)
        except MmchatError as error:
            self._chat.fail(error)
        self._screen.leave_blank()


def dropped_pictures(text: str) -> tuple[str, ...]:
    """The files that a pasted text names, if it names nothing else; addresses wait for Enter."""
    found = paths.read_line(text)
    if found.text or found.missing or not text.strip():
        return ()
    local = all("://" not in source and Path(source).is_file() for source in found.sources)
    return found.sources if local else ()


def open_history(file: Path | None, to_try: Sequence[str] = ()) -> History:
    """Lines of earlier chats; in memory only where there is no file, or it cannot be used.

    to_try: lines that come before them, and are not kept.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if file is None:
        return InMemoryHistory(to_try[::-1])
    try:
        saving.make_private_folder(file.parent)
        if not file.exists():
            atomic_file.write_bytes(file, b"", mode=saving.PRIVATE_FILE)
    except (OSError, MmchatError):
        return InMemoryHistory(to_try[::-1])

    class KeptHistory(FileHistory):
        """Goes on in memory when the disk is full: an error here would stop the prompt."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

        def load_history_strings(self) -> Iterable[str]:
            try:
                return [*to_try, *super().load_history_strings()]
            except OSError:
                return to_try

    return KeptHistory(str(file))
