"""From messages to model inputs: token ids, and pictures as squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mmchat.conversation import Image, Message
from mmchat.errors import CheckpointError, UsageError
from mmchat.models.llava import prompt, squares
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.image_processor import preprocess
from mmchat.models.prepared import Kept
from mmchat.models.prompt import MediaFacts, PlacedMedia, PlainPrompts, Prompt
from mmchat.tokenizers.base import Tokenizer
from mmchat.tokenizers.sentencepiece_file import SentencePieceTokenizer


class LlavaProcessor(PlainPrompts):
    """Builds prompts for one model (models.prompt.Processor), also in several threads at once.

    Recent pictures are kept as squares. Raises CheckpointError for a tokenizer of another kind.
    """

    takes_tools = False
    image_tag = prompt.TAG

    def __init__(
        self, config: LlavaConfig, tokenizer: Tokenizer, alpha: Literal["white", "drop"]
    ) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer):
            raise CheckpointError(
                "LLaVA needs Llama 2's tokenizer.model, a SentencePiece model; give the one that"
                " came with the weights with --tokenizer-path"
            )
        self.config, self.tokenizer = config, tokenizer
        self.alpha: Literal["white", "drop"] = alpha
        self.stop_ids = frozenset({tokenizer.special_id("</s>")})
        self._square = Kept(lambda image: preprocess(image, self.config))

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """Raises UsageError for tools, of which its models were taught nothing."""
        if tools:
            raise UsageError(
                "LLaVA-1.5 was not taught to call tools; leave them out, or ask a Llama 3.2 model"
            )
        return self._prompt(prompt.chat_parts(messages), lead=prompt.LEAD)

    def raw(self, message: Message) -> Prompt:
        return self._prompt(prompt.raw_parts(message))

    def facts(self, image: Image) -> MediaFacts:
        return squares.facts(self.config, image.height, image.width)

    def _prompt(self, parts: Iterable[prompt.Part], lead: str = "") -> Prompt:
        count = self.config.positions_per_image
        ids = prompt.ids_of(parts, self.tokenizer, self.config.image_token_id, count)
        pictures = zip(ids.starts, ids.images, strict=True)
        media = tuple(PlacedMedia(at, count, self._square(image)) for at, image in pictures)
        return Prompt(ids.input_ids, media, lead=lead)
