"""How large a LLaVA is and how much memory it works in. Pure arithmetic, in bytes and numbers."""

from __future__ import annotations

from functools import lru_cache

from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.squares import facts
from mmchat.models.llava.tensor_names import hub_shapes, is_unused
from mmchat.models.sizes import EmbeddingSizes, PartName, parts_of


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: LlavaConfig) -> EmbeddingSizes:
    """Sizes that follow from the configuration alone."""
    text, vision = config.text_config, config.vision_config
    return EmbeddingSizes(
        parts=parts_of(
            hub_shapes(config),
            lambda name: _part_of(name, config),
            is_table=lambda name: "embed" in name,
        ),
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


def _part_of(name: str, config: LlavaConfig) -> PartName:
    if is_unused(name, config):
        return "vision layers that are not used", "vision", "never"
    if name.startswith("vision_tower."):
        return "vision encoder", "vision", "seldom"
    if name.startswith("multi_modal_projector."):
        return "projector", "vision", "seldom"
    if name.startswith("language_model.model.layers."):
        return "decoder", "text", "token"
    if "embed_tokens" in name:
        return "token embedding", "embedding", "seldom"
    return "head", "head", "token"
