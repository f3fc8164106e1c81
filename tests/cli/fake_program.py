"""`mmchat` as a program whose model says what it is told, without torch: it starts at once.

python -m tests.cli.fake_program '{"answer": "A dog.", "delay": 0.1}' generate -p hi
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from mmchat.__main__ import main
from mmchat.engine.events import Event, Finished, Progress, TextDelta, Timings, Usage
from mmchat.loading.options import LoadOptions
from tests.cli.fake_loading import install, known_spec


class ScriptedSession:
    """Says `answer` character by character, `delay` seconds each."""

    def __init__(self, answer: str, delay: float) -> None:
        self.answer = answer
        self.delay = delay
        self.is_interrupted = False

    def interrupt(self) -> None:
        self.is_interrupted = True

    def ask(self, message: Any, sampling: Any) -> Iterator[Event]:
        yield Progress("prefill")
        said = ""
        for char in self.answer:
            time.sleep(self.delay)
            said += char
            yield TextDelta(char, ord(char))
            if self.is_interrupted:
                break
        yield Finished(
            reason="interrupted" if self.is_interrupted else "stop",
            text=said,
            usage=Usage(1, 0, len(said), 0, 0),
            timings=Timings(),
            prompt_ids=(1,),
            output_ids=tuple(map(ord, said)),
            logprobs=(),
            seed=0,
            pictures=(),
        )


def scripted(answer: str, delay: float = 0.0) -> Any:
    return SimpleNamespace(
        spec=known_spec("llama3.2-11B"),
        options=LoadOptions(),
        device="cpu",
        dtype="torch.float32",
        max_seq_len=4096,
        processor=SimpleNamespace(image_tag="", name_tags=None, boxes=lambda _: None),
        chat=lambda system=None: ScriptedSession(answer, delay),
    )


if __name__ == "__main__":
    install(scripted(**json.loads(sys.argv.pop(1))), setattr)
    main()
