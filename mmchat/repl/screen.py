"""The screen of a chat without a terminal: lines in, text out. `terminal_screen` has the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mmchat.engine.events import Event, Finished, TextDelta, read_events
from mmchat.terminal import AnswerStream, one_line, sanitize
from mmchat.words import table

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")
OnText = Callable[[str], None]
Write = Callable[[str], None]


class PlainScreen:
    """For pipes: answers and what commands print on stdout, everything else on stderr.

    out, err: write and flush; a stream that is a terminal gets no control characters. quiet: errors
    alone go to err.
    """

    interactive = False

    def __init__(
        self, out: Write, err: Write, *, out_is_terminal: bool = False, quiet: bool = False
    ) -> None:
        self._out = out
        self._err = err
        self._out_is_terminal = out_is_terminal
        self._quiet = quiet

    def say(self, text: str) -> None:
        """What a command was asked for."""
        self._out(sanitize(text) + "\n" if self._out_is_terminal else text + "\n")

    def note(self, text: str) -> None:
        """One line on what happened."""
        if not self._quiet:
            self._err(sanitize(one_line(text)) + "\n")

    def error(self, text: str) -> None:
        """One line on what did not."""
        self._err(f"mmchat: error: {sanitize(one_line(text))}\n")

    def answer(
        self,
        events: Iterable[Event],
        interrupt: Callable[[], None],
        on_text: OnText,
        *,
        is_json: bool = False,
    ) -> Finished:
        """Show an answer while it is written; on_text gets each piece in the calling thread."""
        stream = AnswerStream(self._out, sanitizes=self._out_is_terminal)

        def show(delta: TextDelta) -> None:
            on_text(delta.text)
            stream.feed(delta.text)

        finished = read_events(events, show)
        stream.finish()
        return finished

    def wait(self, stage: str, work: Callable[[], T]) -> T:
        """The result of `work`; a terminal says what is being done while it takes long."""
        return work()

    def greet(self, lines: Sequence[str], to_try: Sequence[str]) -> None:
        """Show a person what can be done here, and lines to try."""
        for line in [*lines, *(f"to try: {line}" for line in to_try)]:
            self.note(line)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """(label, value) each, as `say` does."""
        self.say(table(rows))

    def turn(self, question: str, answer: str) -> None:
        """Show a person what was said before."""

    def confirm(self, question: str) -> bool:
        """Ask for yes or no; False where nobody can be asked."""
        return False

    def edit(self, text: str) -> str | None:
        """Let the person change `text`; None where there is nobody or they gave up."""
        return None

    def picture(self, image: PIL.Image.Image, name: str = "", facts: Sequence[str] = ()) -> None:
        """Show a small picture where that is possible, and note what is said of it, if anything."""
        if name:
            self.note(f"{name}: {', '.join(facts)}")

    def copy(self, text: str) -> str:
        """Put `text` on the clipboard; says how in a few words. Raises UsageError."""
        return system_clipboard(sanitize(text))


def system_clipboard(text: str) -> str:
    """Copy by pyperclip. Raises UsageError without it or without a clipboard."""
    from mmchat.errors import UsageError

    try:
        import pyperclip

        pyperclip.copy(text)
    except ImportError:
        raise UsageError("copying needs pyperclip; run: pip install 'mmchat[clipboard]'") from None
    except Exception:  # pyperclip has no base class for "there is no clipboard"
        raise UsageError("no clipboard here; on Linux install wl-clipboard or xclip") from None
    return "to the clipboard"
