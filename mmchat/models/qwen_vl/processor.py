"""From messages to model inputs: token ids, and pictures as squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image as PILImage

from mmchat.conversation import Box, Image, Message, NameTags
from mmchat.errors import CheckpointError
from mmchat.models.prepared import PreparedImage, UsualProcessor, normalised
from mmchat.models.prompt import MediaFacts, Prompt, PromptIds
from mmchat.models.qwen_vl import prompt, squares
from mmchat.models.qwen_vl.boxes import boxes_in
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.tokenizers.base import Tokenizer

STOPS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


class QwenVLProcessor(UsualProcessor):
    """Builds prompts for one model. Raises CheckpointError for a tokenizer of another kind."""

    label = prompt.FAMILY
    image_tag = "<img/>"
    name_tags: NameTags | None = NameTags(
        "<img>", "</img>", 254
    )  # in 255 the original finds no end

    def __init__(
        self, config: QwenVLConfig, tokenizer: Tokenizer, alpha: Literal["white", "drop"]
    ) -> None:
        if "<imgpad>" not in tokenizer.special_tokens:
            raise CheckpointError(
                "Qwen-VL needs its own tokenizer, qwen.tiktoken; give the one that came with the"
                " weights with --tokenizer-path"
            )
        count = config.vision_config.n_queries
        super().__init__(tokenizer, alpha, STOPS, count, lambda image: preprocess(image, config))
        self.config = config

    def chat_ids(self, messages: Sequence[Message], tools: object) -> PromptIds:
        return prompt.prompt_ids(prompt.chat_parts(messages), self.tokenizer, self.count)

    def raw_ids(self, message: Message) -> PromptIds:
        return prompt.prompt_ids(prompt.raw_parts(message), self.tokenizer, self.count)

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        alpha = self.config.text_config.alpha(len(token_ids))
        return Prompt(tuple(token_ids), context=f"alpha {alpha}" if alpha > 1 else "")

    def boxes(self, text: str) -> list[Box]:
        return boxes_in(text)

    def facts(self, image: Image) -> MediaFacts:
        return squares.facts(self.config, image.height, image.width)


def preprocess(image: Image, config: QwenVLConfig) -> PreparedImage:
    """RGB pixels -> [C, S, S] float32, bit for bit as the original code with Pillow."""
    values = normalised(square_pixels(image, config), config.image_processor)
    told = squares.facts(config, image.height, image.width)
    return PreparedImage(image.content_hash, told, (values,))


def square_pixels(image: Image, config: QwenVLConfig) -> PILImage.Image:
    """What the encoder sees: the whole picture as S x S pixels, whatever its shape."""
    side = config.vision_config.image_size
    return image.pixels.resize((side, side), PILImage.Resampling.BICUBIC)
