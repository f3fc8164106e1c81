"""The kinds of layer of LLaVA with example arguments, for runtimes that compile layer by layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmchat.models.base import Block, Example
from mmchat.models.llava.vision import VisionLayer
from mmchat.models.row_cache import CAPACITY_STEP
from mmchat.nn.decoder import SelfAttentionLayer
from mmchat.nn.kv_cache import LayerCache, past_steps

if TYPE_CHECKING:
    from mmchat.models.llava.model import LlavaForConditionalGeneration

DRAFT = 4  # tokens verified at once in the example


def compilable_blocks(model: LlavaForConditionalGeneration) -> list[Block]:
    """The text layers in steps, and the vision layers; those on the meta device are left out."""
    text = _loaded(model, SelfAttentionLayer)
    blocks = [
        Block(text, "decode", partial(_step, model, 1)),
        Block(text, "verify", partial(_step, model, DRAFT)),
        Block(_loaded(model, VisionLayer), "vision", partial(_vision, model)),
    ]
    return [block for block in blocks if block.layers]


def _loaded(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    layers = [layer for layer in model.modules() if type(layer) is kind]
    return [layer for layer in layers if not any(p.is_meta for p in layer.parameters())]


def _step(model: LlavaForConditionalGeneration, count: int) -> Example:
    """Of a text layer for `count` tokens of one row."""
    text, like = model.config.text_config, model.like
    size = (1, text.num_key_value_heads, CAPACITY_STEP, text.head_dim)
    row = LayerCache(*size, device=like.device, dtype=like.dtype).row(0)
    positions = torch.arange(count, device=like.device)
    [past] = past_steps([row], positions[None], CAPACITY_STEP)
    cos, sin = model.language_model.model.rotary(positions)
    x = like.new_zeros(count, text.hidden_size)
    dynamic = [(past.key, 2), (past.value, 2), (past.mask, 3)]
    if count > 1:
        dynamic += [(x, 0), (cos, 0), (sin, 0), (past.positions, 1), (past.mask, 2)]
    return Example((x, cos, sin, past), tuple(dynamic))


def _vision(model: LlavaForConditionalGeneration) -> Example:
    """Of a vision layer for a picture."""
    vision = model.config.vision_config
    return Example((model.like.new_zeros(1, vision.num_patches + 1, vision.hidden_size),))
