"""A scripted model with the real engine, for the command line in this process."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mmchat.conversation import Message
from mmchat.loading.options import LoadOptions
from mmchat.models.mllama import tiling
from mmchat.models.prompt import PlacedMedia, Prompt
from tests.cli.fake_loading import known_spec
from tests.fake_model import FakeProcessor, fake_model


class PictureProcessor(FakeProcessor):
    """Lays pictures out on tiles of 112 px with 65 tokens each."""

    def chat(self, messages: Any) -> Prompt:
        return self._with_pictures(super().chat(messages), messages[-1])

    def raw(self, message: Message) -> Prompt:
        return self._with_pictures(super().raw(message), message)

    def _with_pictures(self, prompt: Prompt, message: Message) -> Prompt:
        config = known_spec("tiny").config
        facts = [tiling.facts(config, i.height, i.width) for i in message.images]
        media: Any = [SimpleNamespace(content_hash="", facts=one) for one in facts]
        return replace(prompt, media=tuple(PlacedMedia(0, 0, one) for one in media))


def scripted_model(*answers: bytes, params: str = "llama3.2-11B") -> Any:
    """A fake of `mmchat.load`'s result that says each of `answers` in turn."""
    from mmchat.chat.session import ChatSession

    model = fake_model(*answers)
    model.spec = known_spec(params)
    model.device, model.dtype = "cpu", "torch.float32"
    model.placement = SimpleNamespace(reason="scripted")
    model.options = LoadOptions(quantize="int8")
    model.processor = PictureProcessor()
    model.chat = lambda system=None: ChatSession(model, system)
    return model
