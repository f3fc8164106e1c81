"""The screen of a chat without a terminal: lines in, text out. `terminal_screen` has the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, TypeVar

from mmchat.engine.events import Event, Finished, TextDelta, read_events
from mmchat.terminal import AnswerStream, filled, labelled, one_line, sanitize
from mmchat.words import table

if TYPE_CHECKING:
    import PIL.Image

    from mmchat.repl.thumbnail import Way

T = TypeVar("T")
OnText = Callable[[str], None]
Write = Callable[[str], None]
Columns = Callable[[], int]


@dataclass(eq=False)
class PlainScreen:
    """For pipes: answers and what commands print on stdout, everything else on stderr.

    out, err: write and flush. out_columns, err_columns: give those of the terminal that shows one,
    which gets no control characters and lines that fit; None for a pipe. quiet: errors alone go to
    err. draws: how pictures are shown.
    """

    interactive = False

    out: Write
    err: Write
    _: KW_ONLY
    out_columns: Columns | None = None
    err_columns: Columns | None = None
    quiet: bool = False
    draws: Way = "off"

    def say(self, text: str) -> None:
        """What a command was asked for."""
        columns = self.out_columns
        self.out((filled(sanitize(text), columns(), "    ") if columns else text) + "\n")

    def note(self, text: str) -> None:
        """One line on what happened."""
        if not self.quiet:
            self._line(text)

    def error(self, text: str) -> None:
        """One line on what did not."""
        self._line(f"mmchat: error: {text}")

    def _line(self, text: str) -> None:
        line, columns = sanitize(one_line(text)), self.err_columns
        self.err((filled(line, columns()) if columns else line) + "\n")

    def answer(
        self,
        events: Iterable[Event],
        interrupt: Callable[[], None],
        on_text: OnText,
        *,
        is_json: bool = False,
    ) -> Finished:
        """Show an answer while it is written; on_text gets each piece in the calling thread."""
        stream = AnswerStream(self.out, sanitizes=self.out_columns is not None)

        def show(delta: TextDelta) -> None:
            on_text(delta.text)
            stream.feed(delta.text)

        finished = read_events(events, show)
        stream.finish()
        return finished

    def wait(self, stage: str | Callable[[], str], work: Callable[[], T]) -> T:
        """The result of `work`; a terminal says the stage while it takes long."""
        return work()

    def greet(self, lines: Sequence[str], to_try: Sequence[str]) -> None:
        """Show a person what can be done here, and lines to try."""
        for line in [*lines, *(f"to try: {line}" for line in to_try)]:
            self.note(line)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """(label, value) each, as `say` does."""
        columns = self.out_columns
        self.out((labelled(rows, columns()) if columns else table(rows)) + "\n")

    def turn(self, question: str, answer: str) -> None:
        """Show a person what was said before."""

    def confirm(self, question: str) -> bool:
        """Ask for yes or no; False where nobody can be asked."""
        return False

    def edit(self, text: str) -> str | None:
        """Let the person change `text`; None where there is nobody or they gave up."""
        return None

    def picture(self, image: PIL.Image.Image, name: str, facts: Sequence[str]) -> None:
        """Show a small picture where that is possible, and note what is said of it."""
        self.note(f"{name}: {', '.join(facts)}")

    def drawing(self, image: PIL.Image.Image) -> None:
        """Show a picture that was asked for as large as it goes, where that is possible."""

    def copy(self, text: str) -> str:
        """Put `text` on the clipboard; says how in a few words. Raises UsageError."""
        from mmchat.errors import UsageError

        try:
            import pyperclip

            pyperclip.copy(sanitize(text))  # it may be pasted into a shell
        except ImportError:
            install = "pip install 'mmchat[clipboard]'"
            raise UsageError(f"copying needs pyperclip; run: {install}") from None
        except Exception:  # pyperclip has no base class for "there is no clipboard"
            raise UsageError("no clipboard here; on Linux install wl-clipboard or xclip") from None
        return "to the clipboard"
