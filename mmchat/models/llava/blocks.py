"""The kinds of layer of LLaVA with example arguments, for runtimes that compile layer by layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mmchat.models.base import Block, Example
from mmchat.models.block_examples import DRAFT, loaded_layers, step_example
from mmchat.models.llava.vision import VisionLayer
from mmchat.nn.decoder import SelfAttentionLayer

if TYPE_CHECKING:
    from mmchat.models.llava.model import LlavaForConditionalGeneration


def compilable_blocks(model: LlavaForConditionalGeneration) -> list[Block]:
    """The text layers in steps, and the vision layers."""
    text = loaded_layers(model, SelfAttentionLayer)
    blocks = [
        Block(text, "decode", partial(_step, model, 1)),
        Block(text, "verify", partial(_step, model, DRAFT)),
        Block(loaded_layers(model, VisionLayer), "vision", partial(_vision, model)),
    ]
    return [block for block in blocks if block.layers]


def _step(model: LlavaForConditionalGeneration, count: int) -> Example:
    text = model.config.text_config
    size = (text.hidden_size, text.num_key_value_heads, text.head_dim)
    return step_example(count, size, model.like, model.language_model.model.rotary)


def _vision(model: LlavaForConditionalGeneration) -> Example:
    """Of a vision layer for a picture."""
    vision = model.config.vision_config
    return Example((model.like.new_zeros(1, vision.num_patches + 1, vision.hidden_size),))
