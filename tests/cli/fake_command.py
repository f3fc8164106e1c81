"""The command line with a scripted model behind it; also a program, for pipes and signals.

python -m tests.cli.fake_command '{"answer": "A dog.", "delay": 0.1}' generate -p hi
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mmchat.cli.model_choice import ModelChoice
from mmchat.messages import Message
from mmchat.models.mllama.tiling import choose_layout
from mmchat.params import ModelParams, ModelSource, find_params
from tests.fake_model import FakeProcessor, FakePrompt, fake_model


class PictureProcessor(FakeProcessor):
    """Lays pictures out on tiles of 112 px with 65 tokens each."""

    def chat_prompt(self, messages: Any) -> FakePrompt:
        return self._with_pictures(super().chat_prompt(messages), messages[-1])

    def raw_prompt(self, message: Message) -> FakePrompt:
        return self._with_pictures(super().raw_prompt(message), message)

    def _with_pictures(self, prompt: FakePrompt, message: Message) -> FakePrompt:
        layouts = tuple(choose_layout(i.height, i.width, 112, 4) for i in message.images)
        return replace(
            prompt, layouts=layouts, image_tokens=tuple(65 * x.num_tiles for x in layouts)
        )


def known_params(name: str) -> ModelParams:
    found = find_params(name)
    assert found is not None
    return found


def scripted_model(*answers: bytes, params: str = "llama3.2-11B", delay: float = 0.0) -> Any:
    """A fake of `mmchat.load`'s result that says each of `answers` in turn."""
    from mmchat.session import ChatSession

    model = fake_model(*answers)
    model.params = known_params(params)
    model.device, model.dtype = "cpu", "torch.float32"
    model.placement = SimpleNamespace(reason="scripted")
    model.processor = PictureProcessor()
    model.chat = lambda system=None: ChatSession(model, system)

    def wait(logits: Any) -> Any:
        time.sleep(delay)
        return logits

    model.runtime.logits_hook = wait
    return model


def install(model: Any, set_attribute: Callable[[object, str, Any], None]) -> list[ModelChoice]:
    """Let every command find and load `model`; returns the choices that were loaded."""
    loaded: list[ModelChoice] = []

    def load(choice: ModelChoice, stages: Any) -> Any:
        stages.show("loading the fake")
        loaded.append(choice)
        return model

    source = ModelSource(model.params, None, None)
    set_attribute(ModelChoice, "find", lambda _self, checkpoint_required=True: source)
    set_attribute(ModelChoice, "load", load)
    return loaded


if __name__ == "__main__":
    from mmchat.__main__ import main

    script = json.loads(sys.argv.pop(1))
    install(scripted_model(script["answer"].encode(), delay=script.get("delay", 0.0)), setattr)
    main()
