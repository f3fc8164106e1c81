"""What both kinds of exported programs share: the vision program, caches, example arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim

from mmchat.models.base import ExportLimits
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.row_cache import CAPACITY_STEP
from mmchat.nn.attention import KeyValue


def capacity(max_seq_len: int) -> int:
    """Positions of the static caches (L) of programs for `max_seq_len`; always one to spare."""
    return (max_seq_len // CAPACITY_STEP + 1) * CAPACITY_STEP


class Program(nn.Module):
    """A function of tensors that needs the model."""

    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model


class Vision(Program):
    """Pictures with equal tile counts -> `cross`, a key and a value tensor for each layer."""

    def forward(self, tiles: Tensor, aspect_ratio_id: Tensor) -> list[Tensor]:
        states = self.model.vision_states(tiles, aspect_ratio_id)
        return [t.contiguous() for pair in self.model.cross_key_values(states) for t in pair]


def pairs(tensors: Sequence[Tensor]) -> list[KeyValue]:
    """Keys and values from a flat list of them, layer by layer."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


class Examples:
    """Example arguments of a model's programs, on its device and in its dtype."""

    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        self._config, self._like = model.config, model.like

    def ids(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self._like.device)

    def tiles(self, count: int) -> Tensor:
        """[1, count, C, S, S]"""
        vision = self._config.vision_config
        return self._like.new_zeros(
            1, count, vision.num_channels, vision.image_size, vision.image_size
        )

    def cached(self, length: int) -> list[Tensor]:
        """A key and a value [1, G, length, D] for each self-attention layer."""
        return self._keys_and_values(len(self._config.text_config.self_attention_layers), length)

    def cross(self) -> list[Tensor]:
        """A key and a value for each cross-attention layer, of two tiles."""
        layers = len(self._config.text_config.cross_attention_layers)
        return self._keys_and_values(layers, 2 * self._config.vision_config.tokens_per_tile)

    def vision_tokens(self, limits: ExportLimits) -> Dim:
        """The dynamic size of `cross`."""
        vision = self._config.vision_config
        most = limits.max_images * vision.max_num_tiles * vision.tokens_per_tile
        return Dim("vision_tokens", min=vision.tokens_per_tile, max=most)

    def _keys_and_values(self, layers: int, length: int) -> list[Tensor]:
        text = self._config.text_config
        shape = (1, text.num_key_value_heads, length, text.head_dim)
        return [self._like.new_zeros(shape) for _ in range(2 * layers)]
