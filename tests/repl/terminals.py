"""`mmchat chat` in a pseudo-terminal, with its screen and scrollback."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pexpect
import pyte

from tests.repl.screens import Terminal

ROOT = Path(__file__).parents[2]
READY = "\x1b[?2004h"  # the prompt takes input
SECONDS = 120  # a limit for hangs; loaded machines are slow
PASTE = "\x1b[200~", "\x1b[201~"


class ChatTerminal(Terminal):
    """A running chat. `wait(pattern)` reads until the screen or scrollback shows it."""

    def __init__(
        self,
        folder: Path,
        answers: list[str] | None = None,
        *options: str,
        delay: float = 0.0,
        late: bool = False,
        model: str | None = None,
        thumbnails: str = "blocks",
        typed: str = "",
        columns: int = 90,
        cwd: Path | None = None,
        program: tuple[str, ...] = ("mmchat",),
    ) -> None:
        """Says `answers` in turn, or is the real `model`; `typed` is typed before it starts.

        late: Ctrl-C comes between the first answer and the next prompt.
        program: the module that runs the real one, and its own arguments.
        folder: HOME, with the chats that are kept; the working folder, too, unless `cwd` is.
        """
        super().__init__(columns=columns, rows=24)
        script = json.dumps({"answers": answers, "delay": delay, "late": late})
        arguments = ["-m", "tests.repl.fake_chat", script, "chat", "--thumbnails", thumbnails]
        if model is not None:
            arguments = ["-m", *program, "chat", model, "--thumbnails", thumbnails]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(folder / "state"),
            "HOME": str(folder),
            # compiled kernels are in this user's: to make them anew takes half a minute
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
            "HF_HOME": str(folder / "huggingface"),
            "XTERM_VERSION": "pyte",
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("NO_COLOR", "TMUX", "TERM_PROGRAM", "LC_TERMINAL", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.child = pexpect.spawn(
            sys.executable,
            [*arguments, *options],
            cwd=str(cwd or folder),
            env=environment,
            dimensions=(24, columns),
            encoding="utf-8",
            codec_errors="replace",
            timeout=SECONDS,
        )
        self.screen.write_process_input = self.child.send  # answers where the cursor is
        self.child.send(typed)
        self.wait_until(lambda: READY in self.written, "prompt")
        self.settle()

    def pump(self, seconds: float = 0.05) -> bool:
        """Show what has been written; False at the end of the program."""
        try:
            self.write(self.child.read_nonblocking(65536, timeout=seconds))
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            return False
        return True

    def text(self) -> str:
        return "\n".join(self.lines())

    def wait(self, pattern: str) -> None:
        self.wait_until(lambda: re.search(pattern, self.text()), pattern)

    def wait_until(self, done, what: str) -> None:
        end = time.monotonic() + SECONDS
        while not done():
            alive = self.pump()
            in_time = time.monotonic() < end and (alive or done())
            assert in_time, f"no {what!r} in\n{self.text()}"

    def watch(self, seconds: float) -> None:
        """Show what is written for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.pump()

    def settle(self) -> None:
        """Until nothing more is written for a moment."""
        length = -1
        while length != len(self.written):
            length = len(self.written)
            self.pump(0.3)

    def line(self, text: str) -> None:
        """Type a line and wait for the next prompt."""
        prompts = self.written.count(READY)
        self.send(text + "\r")
        self.wait_until(lambda: self.written.count(READY) > prompts, "prompt")
        self.settle()

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def paste(self, text: str) -> None:
        self.send(PASTE[0] + text + PASTE[1])

    def end(self) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + SECONDS
        while self.pump():
            assert time.monotonic() < end, self.text()
        self.child.wait()
        self.child.close()
        return self.child.exitstatus

    def bottom(self) -> str:
        """The toolbar: the last lines of the screen."""
        return " ".join("\n".join(self.screen.display).rstrip().split("\n")[-2:])


def colors(terminal: Terminal) -> set[str]:
    """Colours of the half blocks on the screen and above it."""
    rows = [*terminal.screen.history.top, *terminal.screen.buffer.values()]
    cells: list[pyte.screens.Char] = [cell for row in rows for cell in row.values()]
    return {cell.fg for cell in cells if cell.data == "▀"}
