"""From messages to model inputs: token ids, and the tiles of each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmchat.conversation import Image, Message
from mmchat.models.mllama import prompt, tiling
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.image_processor import preprocess
from mmchat.models.prepared import UsualProcessor
from mmchat.models.prompt import MediaFacts, PromptIds
from mmchat.tokenizers.base import Tokenizer


class MllamaProcessor(UsualProcessor):
    """Builds prompts for one model; recent pictures are kept as tiles."""

    label = "Llama 3.2 Vision"
    takes_tools = True
    image_tag = ""

    def __init__(
        self, config: MllamaConfig, tokenizer: Tokenizer, alpha: Literal["white", "drop"]
    ) -> None:
        vision, levels = config.vision_config, config.image_processor
        stops = prompt.STOP_TOKENS
        super().__init__(
            tokenizer, alpha, stops, 1, lambda image: preprocess(image, vision, levels)
        )
        self.config = config

    def chat_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> PromptIds:
        return prompt.chat_ids(messages, self.tokenizer, self.config.image_token_id, tools=tools)

    def raw_ids(self, message: Message) -> PromptIds:
        return prompt.raw_ids(message, self.tokenizer, self.config.image_token_id)

    def facts(self, image: Image) -> MediaFacts:
        return tiling.facts(self.config.vision_config, image.height, image.width)
