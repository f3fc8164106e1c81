"""The kinds of layer of Mllama with example arguments, for runtimes that compile layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmchat.models.base import Block, Example, Use
from mmchat.models.block_examples import DRAFT, loaded_layers, step_example
from mmchat.models.mllama.text import CrossAttentionLayer, SeenSteps
from mmchat.models.mllama.vision import GatedVisionLayer, VisionLayer
from mmchat.nn.decoder import SelfAttentionLayer

if TYPE_CHECKING:
    from mmchat.models.mllama.model import MllamaForConditionalGeneration


def compilable_blocks(model: MllamaForConditionalGeneration) -> list[Block]:
    """The text layers in steps, and the vision layers; those on the meta device are left out."""
    examples = _Examples(model)
    kinds: list[tuple[type[nn.Module], Use, Callable[[], Example]]] = [
        (SelfAttentionLayer, "decode", partial(examples.own_step, 1)),
        (CrossAttentionLayer, "decode", partial(examples.cross_step, 1)),
        (SelfAttentionLayer, "verify", partial(examples.own_step, DRAFT)),
        (CrossAttentionLayer, "verify", partial(examples.cross_step, DRAFT)),
        (VisionLayer, "vision", partial(examples.vision, False)),
        (GatedVisionLayer, "vision", partial(examples.vision, False)),
        (GatedVisionLayer, "vision", partial(examples.vision, True)),  # as the last layer runs
    ]
    blocks = [Block(loaded_layers(model, kind), use, example) for kind, use, example in kinds]
    return [block for block in blocks if block.layers]


class _Examples:
    """Arguments for one row."""

    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        self.model = model
        self.text = model.config.text_config

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.model.like.device, dtype=self.model.like.dtype)

    def own_step(self, count: int) -> Example:
        """Of SelfAttentionLayer for `count` tokens."""
        size = (self.text.hidden_size, self.text.num_key_value_heads, self.text.head_dim)
        rotary = self.model.language_model.model.rotary
        return step_example(count, size, self._zeros(1), rotary)

    def cross_step(self, count: int) -> Example:
        """Of CrossAttentionLayer for `count` tokens that see a picture of one tile."""
        tokens = self.model.config.vision_config.tokens_per_tile
        shape = (1, self.text.num_key_value_heads, tokens, self.text.head_dim)
        hidden = self._zeros(count, self.text.hidden_size)
        seen = SeenSteps(self._zeros(*shape), self._zeros(*shape), None, None)
        dynamic = [(seen.key, 2), (seen.value, 2)]
        if count > 1:
            dynamic.append((hidden, 0))
        return Example((hidden, seen), tuple(dynamic))

    def vision(self, valid_only: bool) -> Example:
        """Of VisionLayer.forward for a picture of one tile."""
        vision = self.model.vision_model
        tokens = vision.config.tokens_per_tile
        shares = vision.padding_is_equal
        tiles = 1 if shares else vision.config.max_num_tiles
        hidden = self._zeros(1, (tiles + shares) * (tokens + 1), vision.config.hidden_size)
        args = (hidden, tokens, vision._log_counts(tiles, hidden), valid_only)
        return Example(args, static=((hidden, 0), (hidden, 2)))
