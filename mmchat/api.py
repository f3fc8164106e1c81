"""The Python interface: `mmchat.load(...)` gives a Model to chat with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmchat.catalog.find import ModelSource
from mmchat.chat.session import ChatSession, Event, ImageSource
from mmchat.engine.sampling import SamplingParams
from mmchat.loading import loader
from mmchat.loading.options import LoadOptions, called_with


@dataclass(frozen=True)
class Model(loader.LoadedModel):
    """A loaded model to talk to."""

    def chat(self, system: str | None = None) -> ChatSession:
        """Begin a conversation."""
        return ChatSession(self, system)

    def complete(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """Continue raw text, as base models do."""
        return ChatSession(self).complete(text, images, sampling)


def load_model(options: LoadOptions, source: ModelSource | None = None) -> Model:
    """`loader.load`, for a conversation."""
    return Model(**vars(loader.load(options, source)))


@called_with(LoadOptions)
def load(options: LoadOptions) -> Model:
    """Load a model by name, Hub id or folder; without any, the built-in one.

    Errors are those of mmchat.loading.loader.load.
    """
    return load_model(options)
