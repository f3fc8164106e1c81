"""From messages to model inputs: token ids, and the tiles of each picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mmchat.conversation import Image, Message
from mmchat.models.mllama import prompt
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.image_processor import ImageProcessorConfig, TiledImage, preprocess
from mmchat.models.mllama.model import MllamaInputs
from mmchat.models.mllama.params import ImageProcessorParams
from mmchat.models.mllama.tiling import TileLayout
from mmchat.tokenizers.base import Tokenizer

TILED_IMAGES_KEPT = 16


@dataclass(frozen=True, eq=False)
class MllamaPrompt:
    """A whole conversation, ready to be read. images: (position of the image token, picture)."""

    input_ids: tuple[int, ...]
    images: tuple[tuple[int, TiledImage], ...]
    tokens_per_tile: int

    @property
    def fingerprint(self) -> tuple[int | str, ...]:
        """Token ids, with each image token replaced by its picture's content hash."""
        marks: list[int | str] = list(self.input_ids)
        for position, image in self.images:
            marks[position] = image.content_hash
        return tuple(marks)

    @property
    def layouts(self) -> tuple[TileLayout, ...]:
        return tuple(image.layout for _, image in self.images)

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Vision tokens that each picture adds to cross-attention."""
        return tuple(layout.num_tiles * self.tokens_per_tile for layout in self.layouts)


class MllamaProcessor:
    """Builds prompts for one model. Recently tiled pictures are kept by content."""

    def __init__(
        self,
        config: MllamaConfig,
        image_params: ImageProcessorParams,
        tokenizer: Tokenizer,
        alpha: Literal["white", "drop"],
    ) -> None:
        self.config = config
        self.alpha: Literal["white", "drop"] = alpha
        self.tokenizer = tokenizer
        self._image_config = ImageProcessorConfig(
            image_params.image_mean, image_params.image_std, alpha
        )
        self.stop_ids = prompt.stop_ids(tokenizer)
        self._tiled: OrderedDict[str, TiledImage] = OrderedDict()

    def chat_prompt(self, messages: Sequence[Message]) -> MllamaPrompt:
        """The prompt that lets the assistant answer `messages`, in the chat format."""
        ids = prompt.chat_ids(messages, self.tokenizer, self.config.image_token_id)
        return self._with_tiles(ids)

    def raw_prompt(self, message: Message) -> MllamaPrompt:
        """The prompt that a base model continues: no chat format."""
        return self._with_tiles(prompt.raw_ids(message, self.tokenizer, self.config.image_token_id))

    def inputs(self, whole: MllamaPrompt, start: int) -> MllamaInputs:
        """Positions of `whole` from `start` on, as a batch of one row."""
        new_ids = torch.tensor([whole.input_ids[start:]])
        images = tuple((at, image) for at, image in whole.images if at >= start)
        return MllamaInputs(new_ids, (new_ids.shape[1],), (images,))

    def _with_tiles(self, ids: prompt.PromptIds) -> MllamaPrompt:
        tiled = [self._tile(image) for image in ids.images]
        images = tuple(zip(ids.image_positions, tiled, strict=True))
        return MllamaPrompt(ids.input_ids, images, self.config.vision_config.tokens_per_tile)

    def _tile(self, image: Image) -> TiledImage:
        if image.content_hash not in self._tiled:
            self._tiled[image.content_hash] = preprocess(
                image, self.config.vision_config, self._image_config
            )
            while len(self._tiled) > TILED_IMAGES_KEPT:
                self._tiled.popitem(last=False)
        self._tiled.move_to_end(image.content_hash)
        return self._tiled[image.content_hash]
