"""Arguments with which runtimes compile a layer, for the kinds of layer that families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmchat.models.base import Block, Example
from mmchat.models.row_cache import CAPACITY_STEP
from mmchat.nn.kv_cache import LayerCache, past_steps

DRAFT = 4  # tokens verified at once in the example


def loaded_layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Its layers of this kind but for those on the meta device."""
    layers = [layer for layer in model.modules() if type(layer) is kind]
    return [layer for layer in layers if not any(p.is_meta for p in layer.parameters())]


def step_example(
    count: int,
    size: tuple[int, int, int],
    like: Tensor,
    of_positions: Callable[[Tensor], Sequence[Tensor]],
) -> Example:
    """Of layer(x, *tensors, past) for `count` tokens of one row.

    size: (hidden size, groups, head dim). of_positions: the tensors [N, ...] of positions [N].
    """
    hidden_size, groups, head_dim = size
    cache = LayerCache(1, groups, CAPACITY_STEP, head_dim, device=like.device, dtype=like.dtype)
    positions = torch.arange(count, device=like.device)
    [past] = past_steps([cache.row(0)], positions[None], CAPACITY_STEP)
    by_token = (like.new_zeros(count, hidden_size), *of_positions(positions))
    dynamic = [(past.key, 2), (past.value, 2), (past.mask, 3)]
    if count > 1:
        dynamic += [*((tensor, 0) for tensor in by_token), (past.positions, 1), (past.mask, 2)]
    return Example((*by_token, past), tuple(dynamic))


def decoder_blocks(
    model: nn.Module,
    like: Tensor,
    text: tuple[type[nn.Module], tuple[int, int, int], Callable[[Tensor], Sequence[Tensor]]],
    vision: tuple[type[nn.Module], tuple[int, ...]],
) -> list[Block]:
    """Of a decoder's layers in steps, and of those of its picture encoder.

    text: the kind of layer, with the other arguments of `step_example`. vision: the kind of layer,
    and the shape of a picture in it.
    """
    kind, size, of_positions = text
    layers = loaded_layers(model, kind)
    of_pictures = loaded_layers(model, vision[0])
    blocks = [
        Block(layers, "decode", lambda: step_example(1, size, like, of_positions)),
        Block(layers, "verify", lambda: step_example(DRAFT, size, like, of_positions)),
        Block(of_pictures, "vision", lambda: Example((like.new_zeros(*vision[1]),))),
    ]
    return [block for block in blocks if block.layers]
