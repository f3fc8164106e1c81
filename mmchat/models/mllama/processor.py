"""From messages to model inputs: token ids, and the tiles of each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmchat.conversation import Image, Message
from mmchat.models.mllama import prompt, tiling
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.image_processor import preprocess
from mmchat.models.prepared import Kept
from mmchat.models.prompt import MediaFacts, PlacedMedia, PlainPrompts, Prompt
from mmchat.tokenizers.base import Tokenizer


class MllamaProcessor(PlainPrompts):
    """Builds prompts for one model (models.prompt.Processor), also in several threads at once.

    Recent pictures are kept as tiles.
    """

    takes_tools = True
    image_tag = ""

    def __init__(
        self, config: MllamaConfig, tokenizer: Tokenizer, alpha: Literal["white", "drop"]
    ) -> None:
        self.config = config
        self.alpha: Literal["white", "drop"] = alpha
        self.tokenizer = tokenizer
        self.stop_ids = prompt.stop_ids(tokenizer)
        self._tile = Kept(
            lambda image: preprocess(image, config.vision_config, config.image_processor)
        )

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        ids = prompt.chat_ids(messages, self.tokenizer, self.config.image_token_id, tools=tools)
        return self._with_tiles(ids)

    def raw(self, message: Message) -> Prompt:
        return self._with_tiles(prompt.raw_ids(message, self.tokenizer, self.config.image_token_id))

    def facts(self, image: Image) -> MediaFacts:
        return tiling.facts(self.config.vision_config, image.height, image.width)

    def _with_tiles(self, ids: prompt.PromptIds) -> Prompt:
        pictures = zip(ids.image_positions, ids.images, strict=True)
        media = tuple(PlacedMedia(at, 1, self._tile(image)) for at, image in pictures)
        return Prompt(ids.input_ids, media)
