"""A terminal in memory, to see what is on the screen and in the scrollback."""

from __future__ import annotations

import io
import random

import pyte

from mmchat.cli.console import buffer_console
from mmchat.repl.render import MarkdownStream

SAMPLE = """Here is **what** I see, in a sentence that is long enough to be wrapped anywhere:

# Dogs

- a *brown* dog
- a 犬 with wide glyphs, 漢字漢字漢字漢字漢字漢字漢字漢字 and emoji 🐶🐶 in one long item
  - inside another
- `code`

1. one
2. two

```python
def f(x):

    return x  # a line of code that is longer than the screen is wide, so the terminal wraps it
```

| a | b |
|---|---|
| 1 | 2 |

> quoted

Setext
------

The end, without a newline"""


class Terminal:
    """A pyte screen with history that text is written to."""

    def __init__(self, columns: int = 60, rows: int = 12) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream = pyte.Stream(self.screen)
        self.written = ""

    def write(self, text: str) -> None:
        self.written += text
        self.stream.feed(text)

    def size(self) -> tuple[int, int]:
        return self.screen.columns, self.screen.lines

    def lines(self) -> list[str]:
        """Scrollback and screen, from the top, without trailing blanks."""
        rows = [
            *self.screen.history.top,
            *(self.screen.buffer[y] for y in range(self.screen.lines)),
        ]
        lines = ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def markdown(self, **options) -> MarkdownStream:
        return MarkdownStream(
            self.write, buffer_console, self.size, reflows=False, **{"clock": ticking(), **options}
        )


def ticking():
    """A clock that goes on by a second at each look, so that every piece is drawn."""
    now = iter(range(10**9))
    return lambda: float(next(now))


def buffer_of(text: str) -> io.StringIO:
    return io.StringIO(text)


def cuts(text: str, seed: int, longest: int = 9) -> list[str]:
    """`text` in pieces of random length."""
    rng = random.Random(seed)
    pieces = []
    while text:
        size = rng.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces
