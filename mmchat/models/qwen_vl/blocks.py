"""The kinds of layer of Qwen-VL with example arguments, for runtimes that compile by the layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from mmchat.models.base import Block, Example
from mmchat.models.block_examples import DRAFT, loaded_layers, step_example
from mmchat.models.qwen_vl.text import DecoderLayer
from mmchat.models.qwen_vl.vision import VisionLayer
from mmchat.nn.rope import inverse_frequencies, turns

if TYPE_CHECKING:
    from mmchat.models.qwen_vl.model import QwenVLForConditionalGeneration


def compilable_blocks(model: QwenVLForConditionalGeneration) -> list[Block]:
    """The text layers in steps, and the vision layers."""
    text = loaded_layers(model, DecoderLayer)
    blocks = [
        Block(text, "decode", partial(_step, model, 1)),
        Block(text, "verify", partial(_step, model, DRAFT)),
        Block(loaded_layers(model, VisionLayer), "vision", partial(_vision, model)),
    ]
    return [block for block in blocks if block.layers]


def _step(model: QwenVLForConditionalGeneration, count: int) -> Example:
    text = model.config.text_config
    inv_freq = inverse_frequencies(text.head_dim, text.rotary_emb_base)

    def of_positions(positions: Tensor) -> tuple[Tensor, ...]:
        turned = turns(positions, inv_freq.to(positions.device))
        return (*turned, model.transformer.sharpness(positions))

    size = (text.hidden_size, text.num_attention_heads, text.head_dim)
    return step_example(count, size, model.like, of_positions)


def _vision(model: QwenVLForConditionalGeneration) -> Example:
    """Of a vision layer for a picture."""
    vision = model.config.vision_config
    return Example((model.like.new_zeros(1, vision.num_patches, vision.width),))
