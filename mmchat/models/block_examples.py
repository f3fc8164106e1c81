"""Arguments with which runtimes compile a layer, for the kinds of layer that families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmchat.models.base import Block, Example
from mmchat.models.row_cache import CAPACITY_STEP
from mmchat.nn.attention import KeyValue
from mmchat.nn.kv_cache import past_steps

if TYPE_CHECKING:
    from mmchat.models.embedding_model import EmbeddingModel

DRAFT = 4  # tokens verified at once in the example


def loaded_layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Its layers of this kind but for those on the meta device."""
    layers = [layer for layer in model.modules() if type(layer) is kind]
    return [layer for layer in layers if not any(p.is_meta for p in layer.parameters())]


def step_example(
    count: int, like: Tensor, cached: KeyValue, of_positions: Callable[[Tensor], Sequence[Tensor]]
) -> Example:
    """Of layer(x, *tensors, past) for `count` tokens of one row.

    like: [E]. cached: of CAPACITY_STEP positions. of_positions: the tensors [N, ...] of positions
    [N].
    """
    positions = torch.arange(count, device=like.device)
    [past] = past_steps([cached], positions[None], CAPACITY_STEP)
    by_token = (like.new_zeros(count, *like.shape), *of_positions(positions))
    dynamic = [(past.key, 2), (past.value, 2), (past.mask, 3)]
    if count > 1:
        dynamic += [*((tensor, 0) for tensor in by_token), (past.positions, 1), (past.mask, 2)]
    return Example((*by_token, past), tuple(dynamic))


def decoder_blocks(
    model: EmbeddingModel,
    text: tuple[type[nn.Module], Callable[[Tensor], Sequence[Tensor]]],
    vision: tuple[type[nn.Module], tuple[int, ...]],
) -> list[Block]:
    """Of a decoder's layers in steps, and of those of its picture encoder.

    text: the kind of layer, and `of_positions` of `step_example`. vision: the kind of layer, and
    the shape of a picture in it.
    """
    kind, of_positions = text
    like = model.like

    def step(count: int) -> Example:
        cached = model.new_cache(1, CAPACITY_STEP).rows(0)[0]
        return step_example(count, like, cached, of_positions)

    layers = loaded_layers(model, kind)
    of_pictures = loaded_layers(model, vision[0])
    blocks = [
        Block(layers, "decode", lambda: step(1)),
        Block(layers, "verify", lambda: step(DRAFT)),
        Block(of_pictures, "vision", lambda: Example((like.new_zeros(*vision[1]),))),
    ]
    return [block for block in blocks if block.layers]
