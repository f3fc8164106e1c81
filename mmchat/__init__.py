"""mmchat: Llama 3.2 Vision (Mllama) on your own machine. Everything here loads on first use.

    model = mmchat.load("tiny")
    print(model.ask("What's in this image?", "dog.jpg"))

load             a model by name, folder or Hub id, with the options of the command line
Model            ask, chat, generate_many
ChatSession      a conversation; model.chat() begins one, send() gives the answer as events
SamplingParams   how tokens are chosen, and how many
TextDelta        a piece of an answer; Finished is its end, with the whole text
MmchatError      what a user can cause; its text is one line
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmchat.api import Model, load
    from mmchat.chat.session import ChatSession
    from mmchat.conversation import Image, Message, Text
    from mmchat.engine.events import Finished, Progress, TextDelta, Timings, Usage
    from mmchat.engine.sampling import SamplingParams
    from mmchat.errors import MmchatError
    from mmchat.images import load_image

    __version__: str

# With this torch asks Linux for pages of 2 MB where a tensor is as large, from its first one on:
# tokens and prompts take 0.95 of the time, for a page is found in fewer steps.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    **dict.fromkeys(("load", "Model"), "mmchat.api"),
    **dict.fromkeys(("Text", "Image", "Message"), "mmchat.conversation"),
    **dict.fromkeys(
        ("Progress", "TextDelta", "Finished", "Usage", "Timings"), "mmchat.engine.events"
    ),
    "ChatSession": "mmchat.chat.session",
    "SamplingParams": "mmchat.engine.sampling",
    "load_image": "mmchat.images",
    "MmchatError": "mmchat.errors",
}

__all__ = [
    "ChatSession",
    "Finished",
    "Image",
    "Message",
    "MmchatError",
    "Model",
    "Progress",
    "SamplingParams",
    "Text",
    "TextDelta",
    "Timings",
    "Usage",
    "__version__",
    "load",
    "load_image",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mmchat")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmchat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
