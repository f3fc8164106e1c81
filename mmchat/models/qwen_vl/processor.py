"""From messages to model inputs: pictures as squares, and ChatML as token ids.

Scaffolding is made of ids and text is encoded by itself, so that text that looks like scaffolding
stays text. Only the tags of things and boxes are ids in text too: they are how one asks for places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from PIL import Image as PILImage

from mmchat.conversation import Box, Image, Message, NameTags, Text
from mmchat.errors import CheckpointError
from mmchat.models.family import Alpha
from mmchat.models.messages import PromptPart, Token, check_plain, content_of, ids_of
from mmchat.models.prepared import PreparedImage, UsualProcessor, normalised
from mmchat.models.prompt import Prompt, PromptIds
from mmchat.models.qwen_vl.config import QwenVLConfig, facts
from mmchat.tokenizers.base import Tokenizer

SYSTEM = "You are a helpful assistant."
FAMILY = "Qwen-VL"
SCALE = 1000  # of the numbers: thousandths of the picture's width and height
_POINT = r"\(\s*\d{1,4}\s*,\s*\d{1,4}\s*\)"
_REF = re.compile(r"<ref>([^<]*)</ref>\s*$")
_BOX = re.compile(
    rf"<box>\s*({_POINT}\s*,\s*{_POINT})\s*</box>|<quad>\s*({_POINT}(?:\s*,\s*{_POINT}){{3}})\s*</quad>"
)
STOPS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


class QwenVLProcessor(UsualProcessor):
    """Builds prompts for one model. Raises CheckpointError for a tokenizer of another kind."""

    label = FAMILY
    image_tag = "<img/>"
    told = staticmethod(facts)
    name_tags: NameTags | None = NameTags(
        "<img>", "</img>", 254
    )  # in 255 the original finds no end

    def __init__(self, config: QwenVLConfig, tokenizer: Tokenizer, alpha: Alpha) -> None:
        if "<imgpad>" not in tokenizer.special_tokens:
            raise CheckpointError(
                "Qwen-VL needs its own tokenizer, qwen.tiktoken; give the one that came with the"
                " weights with --tokenizer-path"
            )
        count = config.vision_config.n_queries
        super().__init__(config, tokenizer, alpha, STOPS, count, preprocess)

    def chat_ids(self, messages: Sequence[Message], tools: object) -> PromptIds:
        return prompt_ids(chat_parts(messages), self.tokenizer, self.count)

    def raw_ids(self, message: Message) -> PromptIds:
        return prompt_ids(raw_parts(message), self.tokenizer, self.count)

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        alpha = self.config.text_config.alpha(len(token_ids))
        return Prompt(tuple(token_ids), context=f"alpha {alpha}" if alpha > 1 else "")

    def boxes(self, text: str) -> list[Box]:
        return boxes_in(text)


def preprocess(image: Image, config: QwenVLConfig) -> PreparedImage:
    """RGB pixels -> [C, S, S] float32, bit for bit as the original code with Pillow."""
    values = normalised(square_pixels(image, config), config.image_processor)
    told = facts(config, image.height, image.width)
    return PreparedImage(image.content_hash, told, (values,))


def square_pixels(image: Image, config: QwenVLConfig) -> PILImage.Image:
    """What the encoder sees: the whole picture as S x S pixels, whatever its shape."""
    side = config.vision_config.image_size
    return image.pixels.resize((side, side), PILImage.Resampling.BICUBIC)


def boxes_in(text: str) -> list[Box]:
    """All whole boxes of an answer such as `<ref>the dog</ref><box>(517,508),(589,611)</box>`, in
    their order; several behind one name are all called so.
    """
    boxes: list[Box] = []
    end, ref = 0, None
    for match in _BOX.finditer(text):
        between = text[end : match.start()]
        if named := _REF.search(between):
            ref = named[1].strip()
        elif between.strip():
            ref = None
        numbers = [min(int(number), SCALE) / SCALE for number in re.findall(r"\d+", match[0])]
        boxes.append(Box(ref, tuple(zip(numbers[::2], numbers[1::2], strict=True))))
        end = match.end()
    return boxes


def chat_parts(messages: Sequence[Message]) -> Iterator[PromptPart]:
    """A conversation in ChatML, up to where the answer begins.

    Raises PromptError for no messages, a system message behind others, calls of tools, pictures
    that the user did not send, and over the limits.
    """
    check_plain(messages, FAMILY)
    if messages[0].role != "system":
        messages = [Message("system", SYSTEM), *messages]
    pictures = 0
    for message in messages:
        yield from _header(message.role)
        answer = message.role == "assistant"  # the original strips it before it is put back
        yield from [message.text.strip()] if answer else _content(message, pictures)
        yield from (Token("<|im_end|>"), "\n")
        pictures += len(message.images)
    yield from _header("assistant")


def raw_parts(message: Message) -> Iterator[PromptPart]:
    """A prompt without a conversation, as bases take it: pictures and text."""
    check_plain([message], FAMILY)
    yield from content_of(message)


def _header(role: str) -> Iterator[PromptPart]:
    yield from (Token("<|im_start|>"), role, "\n")


def _content(message: Message, before: int) -> Iterator[PromptPart]:
    """The parts in their order; pictures in front are numbered through the conversation.

    before: pictures in earlier messages. A line's end and the text behind it are encoded together.
    """
    text, is_front = "", True
    for number, part in enumerate(message.content, start=before + 1):
        if isinstance(part, Text):
            is_front, text = False, text + part.text
            continue
        if is_front:
            text += f"Picture {number}: "
        yield from (text, part)
        text = "\n" if is_front else ""
    yield text


def prompt_ids(parts: Iterator[PromptPart], tokenizer: Tokenizer, positions: int) -> PromptIds:
    """Encode the parts. positions: how many ids each picture takes between its tags."""
    begin, end, pad = map(tokenizer.special_id, ("<img>", "</img>", "<imgpad>"))
    return ids_of(parts, tokenizer, [begin, *[pad] * positions, end], before=1)
