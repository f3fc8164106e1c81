"""Pictures as encoders take them: normalised pixels, and recent ones kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.models.prompt import MediaFacts

M = TypeVar("M")
PICTURES_KEPT = 16
Levels = tuple[float, float, float]  # of red, green and blue


@dataclass(frozen=True, eq=False)
class SquareImage:
    """models.prompt.Media of one square picture: tensors is [C, S, S] float32."""

    content_hash: str
    facts: MediaFacts
    tensors: tuple[torch.Tensor, ...]


class Kept(Generic[M]):
    """What was made of the last PICTURES_KEPT pictures, for several threads at once."""

    def __init__(self, make: Callable[[Image], M]) -> None:
        self._make = make
        self._kept: OrderedDict[str, M] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, image: Image) -> M:
        with self._lock:
            made = self._kept.get(image.content_hash)
        if made is None:
            made = self._make(image)
        with self._lock:
            self._kept[image.content_hash] = made
            self._kept.move_to_end(image.content_hash)
            while len(self._kept) > PICTURES_KEPT:
                self._kept.popitem(last=False)
        return made


def normalised(picture: PILImage.Image, mean: Levels, std: Levels) -> torch.Tensor:
    """An RGB picture -> [C, H, W] float32."""
    pixels = np.asarray(picture)
    values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel, table in enumerate(normalised_levels(mean, std)):
        np.take(table, pixels[..., channel], out=values[channel])
    return torch.from_numpy(values)


def normalised_levels(mean: Levels, std: Levels) -> np.ndarray:
    """Normalised value of each of the 256 levels of each channel: [C, 256] float32.

    A table costs one lookup per pixel. The roundings must stay as they are: the product with 1/255
    in float64 rounded to float32, then subtraction and division in float32.
    """
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    means = np.array(mean, dtype=np.float32)[:, None]
    deviations = np.array(std, dtype=np.float32)[:, None]
    return (levels - means) / deviations
