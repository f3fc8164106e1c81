"""Pictures as encoders take them, normalised, and prompts in which squares stand."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from PIL import Image as PILImage

from mmchat.conversation import Box, Image, Message, NameTags
from mmchat.errors import UsageError
from mmchat.models.family import Alpha
from mmchat.models.prompt import Media, MediaFacts, PlacedMedia, Prompt, PromptIds
from mmchat.tokenizers.base import Tokenizer

M = TypeVar("M")
PICTURES_KEPT = 16


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """models.prompt.Media. tensors: what the family's `preprocess` gives."""

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


class UsualProcessor(ABC):
    """Most of a models.prompt.Processor, for a family that says what is abstract.

    It may be used in several threads at once. label: the family's name for people. told: its
    Family.facts. config: of the family. stops: names of the tokens that end an answer. count:
    positions a picture. prepare: makes what the encoder reads of a picture.
    """

    label: ClassVar[str]
    told: Callable[[Any, int, int], MediaFacts]
    image_tag: str
    takes_tools = False
    name_tags: NameTags | None = None
    lead = ""  # Prompt.lead of the chat format

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        alpha: Alpha,
        stops: Sequence[str],
        count: int,
        prepare: Callable[[Image, Any], Media],
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.alpha: Alpha = alpha
        self.stop_ids = frozenset(map(tokenizer.special_id, stops))
        self.count, self._prepare = count, Kept(lambda image: prepare(image, config))

    @abstractmethod
    def chat_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> PromptIds: ...

    @abstractmethod
    def raw_ids(self, message: Message) -> PromptIds: ...

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """Raises UsageError for tools of which its models were taught nothing."""
        if tools and not self.takes_tools:
            raise UsageError(
                f"{self.label} was not taught to call tools; leave them out, or ask a Llama 3.2"
                " model"
            )
        return replace(self._placed(self.chat_ids(messages, tools)), lead=self.lead)

    def raw(self, message: Message) -> Prompt:
        return self._placed(self.raw_ids(message))

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        return Prompt(tuple(token_ids))

    def boxes(self, text: str) -> Sequence[Box] | None:
        return None

    def facts(self, image: Image) -> MediaFacts:
        return self.told(self.config, image.height, image.width)

    def _placed(self, ids: PromptIds) -> Prompt:
        pictures = zip(ids.starts, ids.images, strict=True)
        media = tuple(PlacedMedia(at, self.count, self._prepare(image)) for at, image in pictures)
        return replace(self.of_ids(ids.input_ids), media=media)


def normalised(picture: PILImage.Image | np.ndarray, levels: Any) -> torch.Tensor:
    """An RGB picture -> [C, H, W] float32. levels: the config's `image_processor`.

    A table of the 256 levels costs one lookup per pixel. The roundings must stay as they are: the
    product with 1/255 in float64 rounded to float32, then subtraction and division in float32.
    """
    pixels = np.asarray(picture)
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(levels.image_mean, levels.image_std, strict=True)):
        table = (scaled - np.float32(mean)) / np.float32(std)
        np.take(table, pixels[..., channel], out=values[channel])
    return torch.from_numpy(values)
