"""From messages to model inputs: token ids, and the tiles of each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image, Message
from mmchat.models.family import Alpha
from mmchat.models.mllama import prompt
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.tiling import facts, layout_facts, layout_of
from mmchat.models.prepared import PreparedImage, UsualProcessor, normalised
from mmchat.models.prompt import PromptIds
from mmchat.tokenizers.base import Tokenizer


class MllamaProcessor(UsualProcessor):
    """Builds prompts for one model; recent pictures are kept as tiles."""

    label = "Llama 3.2 Vision"
    takes_tools = True
    image_tag = ""
    told = staticmethod(facts)

    def __init__(self, config: MllamaConfig, tokenizer: Tokenizer, alpha: Alpha) -> None:
        super().__init__(config, tokenizer, alpha, prompt.STOP_TOKENS, 1, preprocess)

    def chat_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> PromptIds:
        return prompt.chat_ids(messages, self.tokenizer, self.config.image_token_id, tools=tools)

    def raw_ids(self, message: Message) -> PromptIds:
        return prompt.raw_ids(message, self.tokenizer, self.config.image_token_id)


def preprocess(image: Image, config: MllamaConfig) -> PreparedImage:
    """Resize, pad, normalise and cut one picture: tiles [T, C, S, S] float32, row by row.

    Only valid tiles, and with them the aspect ratio id [1]. Bit for bit as the Hub's PIL image
    processor and Meta's reference: resize with Pillow's bilinear filter, paste on a black canvas,
    scale to 0..1, subtract the mean, divide by the standard deviation. The black of the canvas is
    normalised like any pixel, so padding inside a tile is -mean/std and not 0.
    """
    layout = layout_of(config.vision_config, image.height, image.width)
    height, width = layout.resized
    picture = image.pixels.resize((width, height), PILImage.Resampling.BILINEAR)
    canvas = np.zeros((*layout.canvas, 3), dtype=np.uint8)
    canvas[:height, :width] = np.asarray(picture)
    tiles_h, tiles_w = layout.aspect_ratio
    side = layout.tile_size
    values = normalised(canvas, config.image_processor)
    tiles = values.reshape(3, tiles_h, side, tiles_w, side).permute(1, 3, 0, 2, 4)
    # compiled programs read their inputs in this order, whatever the strides say
    tiles = tiles.reshape(layout.num_tiles, 3, side, side).contiguous()
    told = layout_facts(layout, config.vision_config)
    tensors = (tiles, torch.tensor([layout.aspect_ratio_id]))
    return PreparedImage(image.content_hash, told, tensors)
