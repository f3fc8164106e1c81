"""`mmchat` as a program with the real session and a scripted model behind it.

python -m tests.repl.fake_chat '{"answers": ["A dog."], "delay": 0.1}' chat
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from typing import Any

from mmchat.__main__ import main
from mmchat.repl.loop import Prompt
from tests.cli.fake_command import scripted_model
from tests.cli.fake_loading import install

if __name__ == "__main__":
    script = json.loads(sys.argv.pop(1))
    model = scripted_model(*(answer.encode() for answer in script["answers"]))

    def wait(logits: Any) -> Any:
        time.sleep(script.get("delay", 0.0))
        return logits

    model.runtime.logits_hook = wait
    model.max_seq_len = script.get("max_seq_len", 131_072)
    if script.get("late"):  # Ctrl-C that is pressed as an answer ends: before its prompt is there
        read, prompts = Prompt.read, itertools.count()

        def read_late(self: Prompt) -> str:
            if next(prompts) == 1:
                signal.raise_signal(signal.SIGINT)
            return read(self)

        Prompt.read = read_late
    install(model, setattr)
    main()
