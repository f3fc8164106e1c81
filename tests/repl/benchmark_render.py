"""What drawing an answer costs, per frame, at three speeds; run by hand, it asserts nothing.

python -m tests.repl.benchmark_render

A frame is drawn at most every 50 ms. While one is drawn the model may have to wait for it, so the
share of a frame's time is the most that drawing can slow the model by.
"""

from __future__ import annotations

import time

from mmchat.cli.console import buffer_console
from mmchat.repl.render import FRAME_SECONDS, MarkdownStream
from tests.repl.screens import SAMPLE

TOKEN_LENGTH = 4  # characters
ANSWER = (SAMPLE + "\n\n") * 8  # some 1,100 tokens with lists, code and tables


def milliseconds_per_frame(tokens_per_second: float) -> float:
    """CPU time of a frame, averaged over the answer."""
    now = 0.0
    stream = MarkdownStream(
        lambda text: None, buffer_console, lambda: (80, 24), clock=lambda: now, reflows=True
    )
    size = round(tokens_per_second * FRAME_SECONDS) * TOKEN_LENGTH
    begin = time.thread_time()
    for start in range(0, len(ANSWER), size):
        now += FRAME_SECONDS
        stream.feed(ANSWER[start : start + size])
    frames = -(-len(ANSWER) // size)
    return (time.thread_time() - begin) / frames * 1000


def main() -> None:
    milliseconds_per_frame(100)  # imports
    for speed in (20, 80, 340):
        cost = milliseconds_per_frame(speed)
        share = cost / 1000 / FRAME_SECONDS
        print(f"{speed:4} tokens/s: {cost:.2f} ms a frame, {share:.2%} of the time")


if __name__ == "__main__":
    main()
