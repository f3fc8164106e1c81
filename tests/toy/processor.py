"""From messages to prompts: bytes, and nine positions for each picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image, Message, Part
from mmchat.errors import PromptError
from mmchat.models.prompt import MediaFacts, PlacedMedia, Prompt
from mmchat.tokenizers.base import Tokenizer
from tests.toy.config import ToyConfig


@dataclass(frozen=True, eq=False)
class ToyMedia:
    """tensors: the patches [P, 3·8·8], float32 in -0.5 .. 0.5, row by row."""

    content_hash: str
    facts: MediaFacts
    tensors: tuple[torch.Tensor, ...]


class ToyProcessor:
    """Builds prompts (models.prompt.Processor)."""

    image_tag = ""
    name_tags = None

    def __init__(
        self, config: ToyConfig, tokenizer: Tokenizer, alpha: Literal["white", "drop"]
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.alpha: Literal["white", "drop"] = alpha
        self.stop_ids = frozenset({tokenizer.special_id("<|eot_id|>")})

    def chat(self, messages: Sequence[Message]) -> Prompt:
        if not messages:
            raise PromptError("the conversation is empty; send a message")
        parts: list[int | Part] = []
        for message in messages:
            end = self.tokenizer.special_id("<|eot_id|>")
            parts += [*self._header(message.role), *message.content, end]
        return self._prompt([*parts, *self._header("assistant")])

    def of_ids(self, token_ids: Sequence[int]) -> Prompt:
        context = f"rotary base {self.config.rotary_base(len(token_ids)):g}"
        return Prompt(tuple(token_ids), context=context)

    def raw(self, message: Message) -> Prompt:
        return self._prompt(message.content)

    def boxes(self, text: str) -> None:
        return None

    def facts(self, image: Image) -> MediaFacts:
        return self.config.facts(image.height, image.width)

    def _header(self, role: str) -> list[int]:
        begin, end = map(self.tokenizer.special_id, ("<|start_header_id|>", "<|end_header_id|>"))
        return [begin, *self.tokenizer.encode(role[0]), end]

    def _prompt(self, parts: Iterable[int | Part]) -> Prompt:
        count = self.config.positions_per_image
        ids, media = [self.tokenizer.special_id("<|begin_of_text|>")], []
        for part in parts:
            if isinstance(part, Image):
                media.append(PlacedMedia(len(ids), count, self._media(part)))
                ids += [self.config.image_token_id] * count
            else:
                ids += [part] if isinstance(part, int) else self.tokenizer.encode(part.text)
        return replace(self.of_ids(ids), media=tuple(media))

    def _media(self, image: Image) -> ToyMedia:
        size, grid, patch = self.config.image_size, self.config.grid, self.config.patch_size
        picture = image.pixels.resize((size, size), PILImage.Resampling.BILINEAR)
        pixels = np.asarray(picture, dtype=np.float32) / 255 - 0.5
        patches = pixels.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 4, 1, 3)
        flat = torch.from_numpy(patches.reshape(grid * grid, -1).copy())
        return ToyMedia(image.content_hash, self.facts(image), (flat,))
