"""What showing an answer costs the loop that writes it; run it by hand, it asserts nothing.

python -m tests.repl.benchmark_render [MODEL] [TOKENS]

The text is a Markdown sample, whatever the model says, so that blocks, lists and code are drawn. CPU
seconds of the drawing thread are set against those of the whole process; the drawing thread can
hold up the model for that long at most.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import mmchat
from mmchat.cli.console import buffer_console
from mmchat.events import Event, Finished, TextDelta
from mmchat.repl.answering import batches
from mmchat.repl.render import FRAME_SECONDS, MarkdownStream
from mmchat.sampling import SamplingParams
from tests.repl.screens import SAMPLE


def events(model: mmchat.Model, tokens: int) -> Iterator[Event]:
    """An answer of `tokens` tokens whose text is the sample, over and over."""
    with contextlib.suppress(AttributeError):
        model.processor.stop_ids = frozenset()
    params = SamplingParams(temperature=1.0, max_new_tokens=tokens, seed=1)
    place = 0
    for event in model.chat().send("Tell me a long story", sampling=params):
        if isinstance(event, TextDelta):
            text = (SAMPLE + "\n\n")[place : place + 4]
            place = (place + 4) % (len(SAMPLE) + 2)
            yield TextDelta(text, event.token_id)
        else:
            yield event


def run(model: mmchat.Model, tokens: int, *, draws: bool) -> tuple[float, float, float]:
    """CPU seconds of this thread and of the process, and tokens per second."""
    written: list[str] = []
    stream = MarkdownStream(written.append, buffer_console, lambda: (80, 24))
    speed = 0.0
    thread, process = time.thread_time(), time.process_time()
    for batch in batches(events(model, tokens), FRAME_SECONDS):
        text = "".join(event.text for event in batch if isinstance(event, TextDelta))
        if draws:
            stream.feed(text)
        if batch and isinstance(batch[-1], Finished):
            speed = batch[-1].timings.tokens_per_second or 0.0
    if draws:
        stream.finish()
    return time.thread_time() - thread, time.process_time() - process, speed


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    model = mmchat.load(name, device="cpu")
    run(model, 50, draws=True)
    for draws in (False, True, False, True):
        drawing, process, speed = run(model, tokens, draws=draws)
        label = "drawn" if draws else "not drawn"
        print(f"{label:<10}{speed:8.1f} tokens/s   this thread {drawing / process:.2%} of the CPU")


if __name__ == "__main__":
    main()
