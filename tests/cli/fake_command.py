"""A scripted model with the real engine, for the command line in this process."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mmchat.conversation import Message
from mmchat.loading.options import LoadOptions
from mmchat.models.mllama.tiling import choose_layout
from tests.cli.fake_loading import known_params
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


def scripted_model(*answers: bytes, params: str = "llama3.2-11B") -> Any:
    """A fake of `mmchat.load`'s result that says each of `answers` in turn."""
    from mmchat.chat.session import ChatSession

    model = fake_model(*answers)
    model.params = known_params(params)
    model.device, model.dtype = "cpu", "torch.float32"
    model.placement = SimpleNamespace(reason="scripted")
    model.options = LoadOptions(quantize="int8")
    model.processor = PictureProcessor()
    model.chat = lambda system=None: ChatSession(model, system)
    return model
