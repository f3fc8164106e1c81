"""How large an Mllama is: parameters by part, and bytes of weights and cache. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.weights import hf_shapes

# Bits per weight of a linear layer; int4 has one 16-bit scale for a group of 32 weights.
LINEAR_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.0, "int4": 4.5}
_VISION_PARTS = ("vision encoder", "projector")


@dataclass(frozen=True)
class Part:
    """One part of a model. parameters: all of them; linear: those in linear layers."""

    name: str
    parameters: int
    linear: int


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model. Cache sizes are numbers stored: keys and values of all layers together.

    cache_per_token: for one text position in self-attention. cache_per_tile: for one tile of a
    picture in cross-attention.
    """

    parts: tuple[Part, ...]
    cache_per_token: int
    cache_per_tile: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    def weight_bytes(self, dtype: str, *, text_only: bool = False) -> int:
        """Bytes of the weights; int8 and int4 quantise linear layers and leave the rest 16-bit.

        text_only leaves out vision and cross-attention.
        """
        unloaded = (*_VISION_PARTS, "cross-attention layers") if text_only else ()
        other_bits = max(16.0, LINEAR_BITS[dtype])
        bits = sum(
            part.linear * LINEAR_BITS[dtype] + (part.parameters - part.linear) * other_bits
            for part in self.parts
            if part.name not in unloaded
        )
        return math.ceil(bits / 8)


def footprint(config: MllamaConfig) -> Footprint:
    """Sizes that follow from the configuration alone."""
    counts: dict[str, list[int]] = {}
    for name, shape in hf_shapes(config).items():
        part = counts.setdefault(_part_of(name, config), [0, 0])
        size = math.prod(shape)
        part[0] += size
        is_linear = len(shape) == 2 and name.endswith(".weight") and "embed" not in name
        part[1] += size if is_linear else 0
    text = config.text_config
    keys_and_values = 2 * text.num_key_value_heads * text.head_dim
    return Footprint(
        parts=tuple(Part(name, *sizes) for name, sizes in counts.items()),
        cache_per_token=keys_and_values * len(text.self_attention_layers),
        cache_per_tile=keys_and_values
        * len(text.cross_attention_layers)
        * config.vision_config.tokens_per_tile,
    )


def _part_of(name: str, config: MllamaConfig) -> str:
    if name.startswith("vision_model."):
        return "vision encoder"
    if name.startswith("multi_modal_projector."):
        return "projector"
    if name.startswith("language_model.model.layers."):
        index = int(name.split(".")[3])
        is_cross = index in config.text_config.cross_attention_layers
        return "cross-attention layers" if is_cross else "self-attention layers"
    return "embeddings and head"
