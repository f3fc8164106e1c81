"""The screen of a real terminal: prompt, live answers, pictures."""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmchat.engine.events import Event, Finished, Progress, TextDelta
from mmchat.errors import UsageError
from mmchat.repl.answering import batches, interrupts
from mmchat.repl.render import FRAME_SECONDS, MakeConsole, MarkdownStream, Size, wrapped
from mmchat.repl.screen import OnText, PlainScreen, T, Write
from mmchat.terminal import filled, one_line, sanitize
from mmchat.words import STAGES

if TYPE_CHECKING:
    import PIL.Image
    from rich.console import Console

    from mmchat.repl.thumbnail import Thumbnails

ROOMY = 20  # rows; on lower terminals the greeting is shorter
STAGE_SHOWN_AFTER = 0.3  # seconds; a step that is shorter is not worth a line
OSC_52_BYTES = 100_000  # terminals drop longer ones
# Cursor, colours, bracketed paste and mouse as they are outside of programs.
SANE = "\x1b[?25h\x1b[0m\x1b[?2004l"
# Select Graphic Rendition. Magenta and red can be read on light and on dark backgrounds alike.
QUIET, ACCENT, WRONG = "2", "35", "31"


class TerminalScreen(PlainScreen):
    """Writes to the terminal with `write`; `ask` reads a line with a prompt (set by the loop)."""

    interactive = True

    def __init__(
        self, write: Write, make_console: MakeConsole, thumbnails: Thumbnails, *, color: bool
    ) -> None:
        columns = lambda: self.size()[0]  # noqa: E731
        super().__init__(self.write, self.write, out_columns=columns, draws=thumbnails.way)
        self.wrote = False  # since the last blank row or prompt
        self.to_try: Sequence[str] = ()  # lines that the Up key brings
        self._write = write
        self.ask: Callable[[str, str], str | None] = lambda prompt, default: None
        self._make_console = make_console
        self._thumbnails = thumbnails
        self.color = color

    def write(self, text: str) -> None:
        self.wrote = self.wrote or bool(text)
        self._write(text)

    def leave_blank(self) -> None:
        """A blank row below what was written, unless there is one."""
        if self.wrote:
            self.write("\n")
        self.wrote = False

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        size = shutil.get_terminal_size()
        return size.columns, size.lines

    def note(self, text: str) -> None:
        self._styled_line(one_line(text), QUIET)

    def error(self, text: str) -> None:
        self._styled_line(one_line(text), WRONG)

    def _styled_line(self, text: str, style: str, indent: str = "") -> None:
        safe = filled(sanitize(text), self.size()[0], indent)
        self.write(self._styled(safe, style) + "\n")

    def _styled(self, text: str, style: str) -> str:
        is_styled = text and style and (self.color or style == QUIET)  # dim is no colour
        return f"\x1b[{style}m{text}\x1b[0m" if is_styled else text

    def greet(self, lines: Sequence[str], to_try: Sequence[str]) -> None:
        self.to_try = to_try
        self.write("\n")
        self._styled_line(lines[0], "")
        for line in lines[1:] if self.size()[1] >= ROOMY else lines[-1:]:
            self.note(line)
        if to_try:
            self.write("\n")
            self.note("To try; the Up key brings them:")
        for line in to_try:
            self._styled_line(f"  {line}", ACCENT, "    ")

    def picture(self, image: PIL.Image.Image, name: str, facts: Sequence[str]) -> None:
        def beside(columns: int) -> list[str]:
            head, *rest = [wrapped(sanitize(one_line(line)), columns) for line in (name, *facts)]
            return [*head, *(self._styled(row, QUIET) for rows in rest for row in rows)]

        drawn = self._thumbnails.draw(image, self._make_console, self.size(), beside)
        if not drawn:
            super().picture(image, name, facts)
            return
        self.write(drawn + "\n")
        self.wrote = False

    def drawing(self, image: PIL.Image.Image) -> None:
        drawn = self._thumbnails.draw(image, self._make_console, self.size(), is_large=True)
        if drawn:
            self.write(drawn + "\n")

    def answer(
        self,
        events: Iterable[Event],
        interrupt: Callable[[], None],
        on_text: OnText,
        *,
        is_json: bool = False,
    ) -> Finished:
        """Show an answer as Markdown, or as code; Ctrl-C stops it, twice raises HardStop."""
        self.leave_blank()
        stream = MarkdownStream(self.write, self._make_console, self.size)
        if is_json:  # no line of JSON begins as the end of such a block does
            stream.feed("```json\n")
        stage = StageLine(self.write, self.size)
        finished = None
        with interrupts(interrupt):
            try:
                for batch in batches(events, FRAME_SECONDS):
                    text = "".join(e.text for e in batch if isinstance(e, TextDelta))
                    for event in batch:
                        if isinstance(event, Progress):
                            stage.begin(STAGES.get(event.stage, event.stage))
                        elif isinstance(event, Finished):
                            finished = event
                    if text:
                        stage.end()
                        on_text(text)
                    if not stage.draw():
                        stream.feed(text)
            finally:
                stage.end()
                stream.finish()
        if finished is None:
            raise RuntimeError("the engine ended without a Finished event")
        return finished

    def wait(self, stage: str | Callable[[], str], work: Callable[[], T]) -> T:
        """Ctrl-C raises KeyboardInterrupt and leaves the work to itself."""
        line = StageLine(self.write, self.size)
        done: list[T] = []

        def events() -> Iterator[Event]:
            done.append(work())
            yield from ()

        try:
            for _ in batches(events(), FRAME_SECONDS):
                line.begin(stage if isinstance(stage, str) else stage())
                line.draw()
        finally:
            line.end()
        return done[0]

    def turn(self, question: str, answer: str) -> None:
        self.write("\n")
        self._styled_line(f"> {question}", QUIET)

        def dimmed(file: io.StringIO, columns: int) -> Console:
            console = self._make_console(file, columns)
            console.style = "dim"
            return console

        stream = MarkdownStream(self.write, dimmed, self.size)
        stream.feed(answer)
        stream.finish()

    def confirm(self, question: str) -> bool:
        answer = self.ask(f"{sanitize(question)} [y/N] ", "")
        return bool(answer) and answer.strip().lower() in ("y", "yes")

    def edit(self, text: str) -> str | None:
        return self.ask("edit (Esc keeps the old)> ", text)

    def copy(self, text: str) -> str:
        """By the system's clipboard, or by the terminal's, which works over ssh too."""
        if not os.environ.get("SSH_CONNECTION"):
            with suppress(UsageError):
                return super().copy(text)
        data = base64.b64encode(sanitize(text).encode(errors="replace"))
        if len(data) > OSC_52_BYTES:
            raise UsageError("the answer is too long for the terminal's clipboard")
        self.write(f"\x1b]52;c;{data.decode()}\x07")
        return "through the terminal, if it allows that"


@dataclass(eq=False)
class StageLine:
    """One transient line that says what is being done, and for how long."""

    write: Write
    size: Size
    _name: str = ""
    _since: float = 0.0
    _drawn: str = ""

    def begin(self, name: str) -> None:
        self._name = name
        self._since = self._since or time.monotonic()

    def draw(self) -> bool:
        """Whether something is being done; shown if that takes long."""
        seconds = time.monotonic() - self._since
        text = f"{self._name} ({seconds:.0f} s, Ctrl-C stops)"[: max(self.size()[0] - 1, 1)]
        if self._name and seconds >= STAGE_SHOWN_AFTER and text != self._drawn:
            self._drawn = text
            self.write(f"\r\x1b[2K\x1b[{QUIET}m{text}\x1b[0m")
        return bool(self._name)

    def end(self) -> None:
        self._name = ""
        if self._drawn:
            self.write("\r\x1b[2K")
            self._drawn = ""


@contextmanager
def quiet_keys(write: Write = lambda text: None) -> Iterator[None]:
    """Keys typed meanwhile are not echoed but wait for the next prompt; Ctrl-C still works.

    Whatever happens inside, the terminal is as before afterwards; write: to it, then.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet: list[Any] = termios.tcgetattr(descriptor)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        write(SANE)
