"""How large a LLaVA is and how much memory it works in. Pure arithmetic, in bytes and numbers."""

from __future__ import annotations

from functools import lru_cache

from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.squares import facts
from mmchat.models.llava.tensor_names import hub_shapes, unused
from mmchat.models.sizes import (
    DECODER,
    EMBEDDING,
    ENCODER,
    PROJECTOR,
    EmbeddingSizes,
    PartName,
    parts_of,
)

_UNUSED: PartName = ("vision layers that are not used", "vision", "never")
_PARTS = {
    "vision_tower.": ENCODER,
    "multi_modal_projector.": PROJECTOR,
    "language_model.model.layers.": DECODER,
    "language_model.model.embed_tokens.": EMBEDDING,
}


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: LlavaConfig) -> EmbeddingSizes:
    """Sizes that follow from the configuration alone."""
    text, vision = config.text_config, config.vision_config
    return EmbeddingSizes(
        parts=parts_of(hub_shapes(config), dict.fromkeys(unused(config), _UNUSED) | _PARTS),
        cache_per_token=2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers,
        head_dim=text.head_dim,
        largest_picture=facts(config, vision.image_size, vision.image_size),
        once_a_picture=(),
        text=text,
        patches=vision.num_patches + 1,
        width=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        behind=vision.hidden_size + 3 * text.hidden_size,
    )
