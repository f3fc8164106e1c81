"""Questions about pictures, and a toy whose parameters are all random."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image, Message, Part, Text
from mmchat.models.prompt import Processor, Prompt
from tests.toy.config import CONFIG
from tests.toy.model import ToyModel


def random_toy() -> ToyModel:
    model = ToyModel(CONFIG)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.125, generator=generator)
    return model


def picture(seed: int, height: int = 30, width: int = 40) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(PILImage.fromarray(pixels), f"{seed}.png", f"hash {seed}")


def ask(processor: Processor, *parts: str | Image) -> Prompt:
    content: list[Part] = [Text(p) if isinstance(p, str) else p for p in parts]
    return processor.chat([Message("user", tuple(content))])
