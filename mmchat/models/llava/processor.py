"""From messages to model inputs: pictures as squares, and the conversation of Vicuna as token ids.

Text is encoded in stretches between special ids and pictures, scaffolding included, because its
tokenizer joins a space to the word behind it. So a user who types "ASSISTANT:" can imitate an
answer, which no encoding prevents; typed names of special tokens stay text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mmchat.conversation import Image, Message, Text
from mmchat.errors import CheckpointError, PromptError
from mmchat.models.family import Alpha
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.image_processor import preprocess
from mmchat.models.llava.squares import facts
from mmchat.models.messages import PromptPart, Token, check_plain
from mmchat.models.prepared import UsualProcessor
from mmchat.models.prompt import PromptIds
from mmchat.tokenizers.base import Tokenizer
from mmchat.tokenizers.sentencepiece_file import SentencePieceTokenizer

FAMILY = "LLaVA-1.5"
TAG = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
LEAD = " "  # in front of an answer, where its tokens have it and its text does not
_END = Token("</s>")  # of an answer


class LlavaProcessor(UsualProcessor):
    """Builds prompts for one model. Raises CheckpointError for a tokenizer of another kind."""

    label = FAMILY
    image_tag = TAG
    lead = LEAD
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
        return self._ids(chat_parts(messages))

    def raw_ids(self, message: Message) -> PromptIds:
        return self._ids(raw_parts(message))

    def _ids(self, parts: Iterator[PromptPart]) -> PromptIds:
        return ids_of(parts, self._pieces, self.config.image_token_id, self.count)


def chat_parts(messages: Sequence[Message]) -> Iterator[PromptPart]:
    """A conversation in the format "vicuna_v1", up to where the answer begins.

    Raises PromptError for no messages, a system message behind others, calls of tools, pictures
    that the user did not send, and over the limits.
    """
    check_plain(messages, FAMILY)
    system = SYSTEM
    if messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    if system:
        yield f"{system} "
    for message in messages:
        if message.role == "user":
            yield "USER: "
            yield from _question(message)
            yield " "
        else:
            yield f"ASSISTANT: {message.text.strip()}"
            yield _END
    yield "ASSISTANT:"


def raw_parts(message: Message) -> Iterator[PromptPart]:
    """A prompt without a conversation, as bases take it: pictures and text."""
    check_plain([message], FAMILY)
    yield from _question(message)


def _question(message: Message) -> Iterator[PromptPart]:
    """The parts in their order; pictures in front stand on lines of their own, as in training."""
    is_front = True
    for part in message.content:
        if isinstance(part, Text):
            is_front = False
            yield part.text
            continue
        yield part
        if is_front:
            yield "\n"


def ids_of(
    parts: Iterable[PromptPart], tokenizer: SentencePieceTokenizer, image_id: int, positions: int
) -> PromptIds:
    """Encode the parts behind the token that begins every prompt.

    positions: how many ids `image_id` each picture takes.
    """
    ids, starts, images = [tokenizer.special_id("<s>")], list[int](), list[Image]()
    text, encode = "", tokenizer.encode
    for part in (*parts, None):
        if isinstance(part, str):
            text += part
            continue
        ids += encode(text) if text else []
        text, encode = "", tokenizer.encode
        if isinstance(part, Token):
            ids.append(tokenizer.special_id(part.name))
            encode = tokenizer.encode_rest  # no space is put in front behind an answer
        elif part is not None:
            starts.append(len(ids))
            images.append(part)
            ids += [image_id] * positions
    if ids.count(image_id) != positions * len(images):
        raise PromptError("the text encodes to an image token; this must not happen")
    return PromptIds(tuple(ids), tuple(starts), tuple(images))
