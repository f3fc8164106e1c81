"""From messages to model inputs: token ids, and pictures as squares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from mmchat.conversation import Box, Image, Message, NameTags
from mmchat.errors import CheckpointError, UsageError
from mmchat.models.prepared import Kept
from mmchat.models.prompt import MediaFacts, PlacedMedia, Prompt
from mmchat.models.qwen_vl import prompt, squares
from mmchat.models.qwen_vl.boxes import boxes_in
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.image_processor import preprocess
from mmchat.tokenizers.base import Tokenizer

STOPS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


class QwenVLProcessor:
    """Builds prompts for one model (models.prompt.Processor), also in several threads at once.

    Recent pictures are kept as squares. Raises CheckpointError for a tokenizer of another kind.
    """

    takes_tools = False
    image_tag = "<img/>"
    name_tags = NameTags("<img>", "</img>", 254)  # in 255 the original finds no end

    def __init__(
        self, config: QwenVLConfig, tokenizer: Tokenizer, alpha: Literal["white", "drop"]
    ) -> None:
        if "<imgpad>" not in tokenizer.special_tokens:
            raise CheckpointError(
                "Qwen-VL needs its own tokenizer, qwen.tiktoken; give the one that came with the"
                " weights with --tokenizer-path"
            )
        self.config, self.tokenizer = config, tokenizer
        self.alpha: Literal["white", "drop"] = alpha
        self.stop_ids = frozenset(map(tokenizer.special_id, STOPS))
        self._square = Kept(lambda image: preprocess(image, config))

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """Raises UsageError for tools, of which its models were taught nothing."""
        if tools:
            raise UsageError(
                "Qwen-VL was not taught to call tools; leave them out, or ask a Llama 3.2 model"
            )
        return self._prompt(prompt.chat_parts(messages))

    def raw(self, message: Message) -> Prompt:
        return self._prompt(prompt.raw_parts(message))

    def boxes(self, text: str) -> list[Box]:
        return boxes_in(text)

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        return Prompt(tuple(token_ids), context=prompt.rotation(self.config, len(token_ids)))

    def facts(self, image: Image) -> MediaFacts:
        return squares.facts(self.config, image.height, image.width)

    def _prompt(self, parts: Iterator[prompt.Part]) -> Prompt:
        count = self.config.vision_config.n_queries
        ids = prompt.ids_of(parts, self.tokenizer, count)
        pictures = zip(ids.starts, ids.images, strict=True)
        media = tuple(PlacedMedia(at, count, self._square(image)) for at, image in pictures)
        return replace(self.of_ids(ids.input_ids), media=media)
