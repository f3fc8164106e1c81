"""What families share of their params files: each section is a field of the family's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmchat.strict_json import Where, check_divides

Bounds = Mapping[str, tuple[float, float]]  # of a section: field -> (least, most)

EPS = (1e-12, 1e-2)
_OF_LAYERS: Bounds = {
    "hidden_size": (8, 32_768),
    "intermediate_size": (8, 131_072),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 512),
}
OF_VISION: Bounds = {
    **_OF_LAYERS,
    "num_channels": (3, 3),
    "image_size": (8, 2_240),
    "patch_size": (2, 256),
}
OF_TEXT: Bounds = {
    "vocab_size": (257, 300_000),
    **_OF_LAYERS,
    "num_key_value_heads": (1, 512),
    "rms_norm_eps": EPS,
    "rope_theta": (1.0, 1e9),
    "max_position_embeddings": (16, 2**24),
}
OF_PICTURES: Bounds = {"image_mean": (0.0, 1.0), "image_std": (1e-3, 1.0)}


def check_decoder(text: Any, where: Where) -> None:
    """Raises where's error unless heads divide the width evenly, as nn.decoder needs it."""
    check_divides(text, "num_attention_heads", "hidden_size", where)
    check_divides(text, "num_key_value_heads", "num_attention_heads", where)
    if text.head_dim % 2:
        raise where.child("num_attention_heads").fail(
            f"{text.head_dim} dimensions per head; rotary positions need an even number"
        )
