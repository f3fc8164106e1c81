"""Shapes of tensors by name, for the parts that families share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Shape = tuple[int, ...]


def biased(name: str, *shape: int) -> dict[str, Shape]:
    """A weight of this shape and its bias; of one axis, those of a norm."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def numbered(prefix: str, numbers: Iterable[int], layer: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of several equal layers."""
    return {f"{prefix}{i}.{name}": shape for i in numbers for name, shape in layer.items()}


def decoder_layer(text: Any, attention: str = "self_attn") -> dict[str, Shape]:
    """Of a layer of nn.decoder, or one that differs from it in the name of its attention."""
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = (
        n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads)
    )
    return {
        f"{attention}.q_proj.weight": (queries, width),
        f"{attention}.k_proj.weight": (keys, width),
        f"{attention}.v_proj.weight": (keys, width),
        f"{attention}.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
