"""The kinds of layer of Mllama with example arguments, for runtimes that compile layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from mmchat.models.base import Block, Example, Use
from mmchat.models.block_examples import DRAFT, loaded_layers, step_example
from mmchat.models.mllama.text import CrossAttentionLayer, SeenSteps
from mmchat.models.mllama.vision import GatedVisionLayer, VisionLayer
from mmchat.models.row_cache import CAPACITY_STEP
from mmchat.nn.attention import held
from mmchat.nn.decoder import SelfAttentionLayer

if TYPE_CHECKING:
    from mmchat.models.mllama.model import MllamaForConditionalGeneration


def compilable_blocks(model: MllamaForConditionalGeneration) -> list[Block]:
    """The text layers in steps, and the vision layers; those on the meta device are left out."""
    rotary = model.language_model.model.rotary

    def own(count: int) -> Example:
        cached = model.new_cache(1, CAPACITY_STEP).rows(0)[0]
        return step_example(count, model.like, cached, rotary)

    kinds: list[tuple[type[nn.Module], Use, Callable[[], Example]]] = [
        (SelfAttentionLayer, "decode", partial(own, 1)),
        (CrossAttentionLayer, "decode", partial(_cross_step, model, 1)),
        (SelfAttentionLayer, "verify", partial(own, DRAFT)),
        (CrossAttentionLayer, "verify", partial(_cross_step, model, DRAFT)),
        (VisionLayer, "vision", partial(_vision, model, False)),
        (GatedVisionLayer, "vision", partial(_vision, model, False)),
        (GatedVisionLayer, "vision", partial(_vision, model, True)),  # as the last layer runs
    ]
    blocks = [Block(loaded_layers(model, kind), use, example) for kind, use, example in kinds]
    return [block for block in blocks if block.layers]


def _cross_step(model: MllamaForConditionalGeneration, count: int) -> Example:
    """Of CrossAttentionLayer for `count` tokens that see a picture of one tile."""
    text, like = model.config.text_config, model.like
    tokens = model.config.vision_config.tokens_per_tile
    shape = (1, text.num_key_value_heads, tokens, text.head_dim)
    hidden = like.new_zeros(count, text.hidden_size)
    key, value = (held(like.new_zeros(shape), model.kv_dtype or like.dtype) for _ in range(2))
    seen = SeenSteps(key, value, None, None)
    dynamic = [(seen.key, 2), (seen.value, 2)]
    if count > 1:
        dynamic.append((hidden, 0))
    return Example((hidden, seen), tuple(dynamic))


def _vision(model: MllamaForConditionalGeneration, valid_only: bool) -> Example:
    """Of VisionLayer.forward for a picture of one tile."""
    vision = model.vision_model
    tokens, shares = vision.config.tokens_per_tile, vision.padding_is_equal
    tiles = 1 if shares else vision.config.max_num_tiles
    shape = (1, (tiles + shares) * (tokens + 1), vision.config.hidden_size)
    hidden = model.like.new_zeros(shape)
    args = (hidden, tokens, vision._log_counts(tiles, hidden), valid_only)
    return Example(args, static=((hidden, 0), (hidden, 2)))
