"""From messages to model inputs: token ids, and pictures as squares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmchat.conversation import Message
from mmchat.errors import CheckpointError
from mmchat.models.family import Alpha
from mmchat.models.llava import prompt
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.image_processor import preprocess
from mmchat.models.llava.squares import facts
from mmchat.models.messages import PromptPart
from mmchat.models.prepared import UsualProcessor
from mmchat.models.prompt import PromptIds
from mmchat.tokenizers.base import Tokenizer
from mmchat.tokenizers.sentencepiece_file import SentencePieceTokenizer


class LlavaProcessor(UsualProcessor):
    """Builds prompts for one model. Raises CheckpointError for a tokenizer of another kind."""

    label = prompt.FAMILY
    image_tag = prompt.TAG
    lead = prompt.LEAD
    told = staticmethod(facts)

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer, alpha: Alpha) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer):
            raise CheckpointError(
                "LLaVA needs Llama 2's tokenizer.model, a SentencePiece model; give the one that"
                " came with the weights with --tokenizer-path"
            )
        count = config.positions_per_image
        super().__init__(config, tokenizer, alpha, ["</s>"], count, preprocess)
        self._pieces = tokenizer

    def chat_ids(self, messages: Sequence[Message], tools: object) -> PromptIds:
        return self._ids(prompt.chat_parts(messages))

    def raw_ids(self, message: Message) -> PromptIds:
        return self._ids(prompt.raw_parts(message))

    def _ids(self, parts: Iterator[PromptPart]) -> PromptIds:
        return prompt.ids_of(parts, self._pieces, self.config.image_token_id, self.count)
