"""The only place that writes to the terminal: answers to stdout, everything else to stderr.

Text that is not ours (model output, file names, server messages) is sanitized when the stream is a
terminal and passes untouched when it is a pipe or a file. Rich markup is never interpreted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from mmchat import words
from mmchat.errors import INTERRUPTED_EXIT_CODE, DiskError, UsageError
from mmchat.terminal import filled, one_line, sanitize

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.status import Status

FAILURES_SHOWN = 3  # of many; how many there are is said
UNBROKEN = 10_000  # columns of a pipe or a file, whose lines end where they end
ColorMode = Literal["auto", "always", "never"]
_color: ColorMode = "auto"
_quiet = False
_AS_IT_IS: Any = {"markup": False, "highlight": False, "emoji": False}  # text, for rich
ANSWER_STYLES = {  # of Markdown, where rich's own need a dark background
    "markdown.code": "cyan",
    "markdown.code_block": "cyan",
    "markdown.link": "none",
    "markdown.link_url": "underline",
}


def set_color(mode: ColorMode) -> None:
    """Choose colours for the rest of the run; `auto` colours terminals unless NO_COLOR is set."""
    global _color
    _color = mode


def set_quiet(quiet: bool) -> bool:
    """Leave out notes, spinners and bars for the rest of the run, as --quiet asks; returns it."""
    global _quiet
    _quiet = quiet
    return quiet


def rich_console() -> Console:
    """What draws on stderr."""
    from rich.console import Console

    return Console(
        stderr=True,
        width=None if is_terminal(sys.stderr) else UNBROKEN,
        **_AS_IT_IS,
        no_color=True if _color == "never" else None,
        force_terminal=True if _color == "always" else None,
    )


def buffer_console(file: io.StringIO, columns: int) -> Console:
    """A Console that writes for a terminal of `columns`, but into `file`."""
    from rich.console import Console
    from rich.theme import Theme

    return Console(
        file=file,
        theme=Theme(ANSWER_STYLES),
        width=columns,
        **_AS_IT_IS,
        force_terminal=True,
        no_color=None if uses_color() else True,
        legacy_windows=False,
    )


def uses_color() -> bool:
    """True if what goes to a terminal on stdout may be coloured."""
    return _color == "always" or (_color == "auto" and not os.environ.get("NO_COLOR"))


def draws(stream: TextIO | None) -> bool:
    """True if `stream` is a terminal that can move its cursor."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb"


def columns(stream: TextIO | None) -> int:
    """Columns of the terminal that shows `stream`; as good as endless for a pipe or a file."""
    return terminal_size()[0] if is_terminal(stream) else UNBROKEN


def wrapped(text: str, indent: str = "") -> str:
    """`text` for stdout; for a terminal safe, on lines as wide, all but the first indented."""
    safe = sanitize(text) if is_terminal(sys.stdout) else text
    return filled(safe, columns(sys.stdout), indent)


def terminal_size() -> tuple[int, int]:
    """Columns and rows of the terminal."""
    size = shutil.get_terminal_size()
    return size.columns, size.lines


def is_terminal(stream: TextIO | None) -> bool:
    """True if `stream` is shown by a terminal; a closed or missing stream is not."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def is_piped(unknown: bool) -> bool:
    """Whether stdin is a pipe, a socket or a file: no terminal and not /dev/null.

    unknown: where that cannot be told.
    """
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError):
        return unknown


def note(*texts: str) -> None:
    """A line of each on stderr for the person at the terminal, unless --quiet is given."""
    if not _quiet:
        say(*texts)


def note_failures(errors: Sequence[str]) -> None:
    """The first of them, and how many more there are."""
    more = len(errors) - FAILURES_SHOWN
    note(*errors[:FAILURES_SHOWN], *([f"and {more:,} more failed"] if more > 0 else []))


def say(*texts: str) -> None:
    """A line of each on stderr, also if quiet: what is stopped or asked."""
    for text in texts:
        _stderr_line(text, style="dim")


def error(text: str) -> None:
    """The one line that says why the command ends."""
    _stderr_line(f"mmchat: error: {text}", style="red")


def confirm(question: str) -> bool:
    """Ask on stderr and read the answer from stdin; only "y" or "yes" means yes."""
    return ask(f"{question} [y/N] ").lower() in ("y", "yes")


def agree(question: str, option: str) -> None:
    """Ask before something is deleted. Raises UsageError where nobody is there, Abort for a no."""
    import typer

    if not is_terminal(sys.stdin):
        raise UsageError(f"{option} asks before it deletes; without a terminal give --yes")
    if not confirm(question):
        raise typer.Abort


def ask(question: str) -> str:
    """Ask on stderr and read a line from stdin."""
    write_safely(one_line(question), sys.stderr)
    return sys.stdin.readline().strip()


def _stderr_line(text: str, style: str) -> None:
    text = one_line(text)
    if is_terminal(sys.stderr):
        text = filled(sanitize(text), terminal_size()[0])
    if uses_color() and (is_terminal(sys.stderr) or _color == "always"):
        from rich.text import Text

        rich_console().print(Text(text, style=style), soft_wrap=True)
    else:
        write_out(text + "\n", sys.stderr)


@contextlib.contextmanager
def interrupt_says(message: str) -> Iterator[None]:
    """Within the block Ctrl-C, where no model answers, ends the command with `message`."""
    try:
        yield
    except KeyboardInterrupt:
        say(message)
        sys.exit(INTERRUPTED_EXIT_CODE)


def print_json(value: Any) -> None:
    """One JSON value on one line; pure ASCII on a terminal, so that no control character passes."""
    write_out(to_json(value, ascii_only=is_terminal(sys.stdout)) + "\n")


def to_json(value: Any, *, ascii_only: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)


def write_out(text: str, stream: TextIO | None = None) -> None:
    """Write and flush; DiskError if the device behind the stream is full.

    Notes that cannot be written are dropped: nobody who can read them is no reason to stop.
    """
    out = sys.stdout if stream is None else stream
    try:
        out.write(text)
        out.flush()
    except OSError as problem:
        if out is sys.stderr:
            forget(out)
        elif isinstance(problem, BrokenPipeError):
            raise
        else:
            raise DiskError(f"cannot write the output: {problem.strerror or problem}") from problem


def write_safely(text: str, stream: TextIO | None = None) -> None:
    """Text with names from outside in it, to stdout or `stream`."""
    out = sys.stdout if stream is None else stream
    write_out(sanitize(text) if is_terminal(out) else text, out)


def print_path(path: Path) -> None:
    """A path to stdout: as it is into a pipe, in one line on a terminal."""
    shown = one_line(str(path)) if is_terminal(sys.stdout) else str(path)
    write_safely(f"{shown}\n")


def fact_text(facts: list[tuple[str, str]]) -> str:
    """One `label  value` line for each fact, values in one column."""
    return words.table([(label, one_line(value)) for label, value in facts]) + "\n"


def print_facts(facts: list[tuple[str, str]]) -> None:
    """`fact_text` to stdout, where a terminal gets no line wider than it is, but for long names."""
    indent = max(len(label) for label, _ in facts) + 2
    room = max(columns(sys.stdout) - indent, 24)
    broken = "\n" + " " * indent
    rows = [(label, filled(one_line(value), room).replace("\n", broken)) for label, value in facts]
    write_safely(words.table(rows) + "\n")


def table_rows(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int],
    *,
    grouped: bool = True,
) -> list[str]:
    """The heads and each row for stdout, in columns; one too wide for a terminal goes on below.

    right: columns that end at one place; the others begin at one. grouped: what stands first in
    several rows is shown once.
    """
    before = ["", *(row[0] for row in rows)]
    shown = [
        ("" if grouped and row[0] == above else row[0], *row[1:])
        for row, above in zip(rows, before, strict=False)
    ]
    head, *lines = words.table([heads, *shown], right, columns(sys.stdout)).split("\n")
    head = wrapped(head, "  ")
    bold = f"\x1b[1m{head}\x1b[0m" if draws(sys.stdout) else head
    return [bold, *(wrapped(line, "  ") for line in lines)]


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int],
    *,
    grouped: bool = True,
) -> None:
    """Rows under their heads to stdout: `table_rows` on a terminal, lines with tabs elsewhere."""
    if not is_terminal(sys.stdout):
        write_out("".join("\t".join(row) + "\n" for row in (heads, *rows)))
        return
    clean = [[sanitize(one_line(cell)) for cell in row] for row in rows]
    write_out("\n".join(table_rows(heads, clean, right, grouped=grouped)) + "\n")


def shows_progress() -> bool:
    """Whether spinners and bars are drawn: on a terminal, unless --quiet is given."""
    return not _quiet and is_terminal(sys.stderr)


class Stages:
    """What is being done now, as a spinner on stderr; silent unless stderr is a terminal."""

    _status: Status | None = None

    def show(self, stage: str) -> None:
        """Name the step that begins; the last one named stays until `stop`."""
        if not shows_progress():
            return
        from rich.text import Text

        text = Text(sanitize(one_line(stage)))
        if self._status is not None:
            self._status.update(text)
            return
        console = rich_console()
        if not console.is_dumb_terminal:
            self._status = console.status(text)
            self._status.start()

    def note(self, text: str) -> None:
        """A line on stderr that stays; nothing if quiet."""
        self.stop()
        note(text)

    def stop(self) -> None:
        """Erase the spinner; call before anything else is written."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr for `total` steps, and what moves it on by one: `advance(details="")`.

    Silent unless stderr is a terminal.
    """
    if not shows_progress():
        yield lambda details="": None  # noqa: ARG005
        return
    from rich import progress as rich

    texts = rich.TextColumn("{task.description}"), rich.TextColumn("{task.fields[details]}")
    shown = rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()
    with rich.Progress(
        texts[0], *shown, texts[1], console=rich_console(), transient=True
    ) as progress:
        task = progress.add_task(sanitize(label), total=total, details="")
        yield lambda details="": progress.update(task, advance=1, details=details)


def open_missing_streams() -> None:
    """Make a standard stream that is closed one of /dev/null.

    So the name `sys.stdout` always stands for a stream, and no file or socket gets its number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def forget_streams() -> None:
    """Point stdout and stderr at nothing after their reader has gone, so that nothing complains."""
    forget(sys.stdout)
    forget(sys.stderr)


def forget(stream: TextIO) -> None:
    """Point the descriptor of `stream` at nothing; what is still to be written goes there."""
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
