"""Asks the terminal which pictures it can show, and loses no key that is typed meanwhile.

All questions go out at once when the chat starts; the answers are read just before the first
prompt, when all for it is imported. The last question is one that every terminal answers. What
comes in and is no answer was typed: it waits for the prompt.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from mmchat.repl.terminal_screen import quiet_keys

PATIENCE = 1.0  # seconds from the questions to the last answer
_KITTY = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"
_CELL_SIZE = "\x1b[16t"
_SIXEL_COLORS = "\x1b[?1;1;0S"
_VERSION = "\x1b[>q"  # the terminal's name and version, where it has this question
_ATTRIBUTES = "\x1b[c"  # primary device attributes; every terminal answers
_KITTY_ANSWER = re.compile(r"\x1b_G[^\x1b]*i=31[^\x1b]*;OK\x1b\\")
_CELL_SIZE_ANSWER = re.compile(r"\x1b\[6;(\d{1,4});(\d{1,4})t")
_SIXEL_COLORS_ANSWER = re.compile(r"\x1b\[\?1;0;(\d{1,6})S")
_ATTRIBUTES_ANSWER = re.compile(r"\x1b\[\?([\d;]*)c")
_ITERM2_ANSWER = re.compile(r"\x1bP>\|iTerm2[^\x1b]*\x1b\\")
ANSWER = re.compile(
    r"\x1b_G[^\x1b]*\x1b\\|\x1bP>\|[^\x1b]*\x1b\\|\x1b\[6;\d+;\d+t|\x1b\[\?[\d;]*[cS]"
)
_BEGUN = re.compile(r"\x1b(_G[^\x1b]*\x1b?|P>\|[^\x1b]*\x1b?|\[\?[\d;]*|\[6;[\d;]*)$")


@dataclass(frozen=True)
class Answers:
    """What the terminal said. cell: height and width of a cell in pixels, or None.

    typed: keys pressed until now. complete: False if the terminal may still answer.
    """

    kitty: bool = False
    iterm2: bool = False
    sixel: bool = False
    cell: tuple[int, int] | None = None
    sixel_colors: int = 256
    typed: str = ""
    complete: bool = True


def questions(environment: Mapping[str, str]) -> str:
    """What to write to the terminal; two of the questions only where they can do no harm.

    tmux and screen would take kitty's for a title, the Linux console and Terminal.app would print
    it; the name of the terminal is not that of tmux.
    """
    prints = environment.get("TERM_PROGRAM") == "Apple_Terminal" or (
        environment.get("TERM", "").startswith("linux")
    )
    some = "" if prints or is_multiplexed(environment) else _KITTY + _VERSION
    return f"\x1b7{some}{_CELL_SIZE}{_SIXEL_COLORS}{_ATTRIBUTES}\x1b8\x1b[K"


def is_multiplexed(environment: Mapping[str, str]) -> bool:
    """Whether tmux or screen stands between this program and the terminal."""
    return "TMUX" in environment or environment.get("TERM", "").startswith(("tmux", "screen"))


def read_answers(text: str) -> Answers:
    """Sort what came from the terminal into answers and typed keys."""
    attributes = _ATTRIBUTES_ANSWER.search(text)
    cell = _CELL_SIZE_ANSWER.search(text)
    colors = _SIXEL_COLORS_ANSWER.search(text)
    size = (int(cell[1]), int(cell[2])) if cell else None
    return Answers(
        kitty=bool(_KITTY_ANSWER.search(text)),
        iterm2=bool(_ITERM2_ANSWER.search(text)),
        sixel=attributes is not None and "4" in attributes[1].split(";")[1:],
        cell=size if size and min(size) > 0 else None,
        sixel_colors=min(max(int(colors[1]), 2), 256) if colors else 256,
        typed=_BEGUN.sub("", ANSWER.sub("", text)),
        complete=attributes is not None,
    )


@contextmanager
def asked(write: Callable[[str], None], *, ask: bool = True) -> Iterator[Callable[[], Answers]]:
    """Ask at the start of the block; the function given, called once within it, has the answers.

    Within the block keys are not echoed. Return pressed before the block counts as Return, though
    the terminal was still turning it into a newline.
    """
    descriptor = sys.stdin.fileno()
    with quiet_keys():
        early = _read_waiting(descriptor).replace("\n", "\r")
        if ask:
            write(questions(os.environ))
        deadline = time.monotonic() + PATIENCE

        def answers() -> Answers:
            text = _read_waiting(descriptor)
            while ask and not _ATTRIBUTES_ANSWER.search(text):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                    break
                if not (more := _read_waiting(descriptor)):
                    break  # the terminal is gone
                text += more
            found = read_answers(text)
            return replace(
                found,
                cell=found.cell or _cell_by_size(descriptor),
                typed=early + found.typed,
                complete=found.complete or not ask,
            )

        yield answers


def _read_waiting(descriptor: int) -> str:
    """Everything that can be read now."""
    data = b""
    with suppress(OSError):
        while select.select([descriptor], [], [], 0)[0] and (piece := os.read(descriptor, 4096)):
            data += piece
    return data.decode("utf-8", "surrogateescape")


def _cell_by_size(descriptor: int) -> tuple[int, int] | None:
    """Height and width of a cell from the size of the window, where the terminal tells it."""
    try:
        packed = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return None
    rows, columns, width, height = struct.unpack("HHHH", packed)
    if not (rows and columns and height >= rows and width >= columns):
        return None
    return height // rows, width // columns
