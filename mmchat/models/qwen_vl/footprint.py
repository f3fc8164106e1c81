"""How large a Qwen-VL is and how much memory it works in. Pure arithmetic, in bytes and numbers."""

from __future__ import annotations

from functools import lru_cache

from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.squares import facts
from mmchat.models.qwen_vl.tensor_names import VISION, hub_shapes
from mmchat.models.sizes import DECODER, EMBEDDING, ENCODER, EmbeddingSizes, PartName, parts_of

_PARTS: dict[str, PartName] = {
    f"{VISION}transformer.": ENCODER,
    VISION: ("patches and resampler", "vision", "seldom"),
    "transformer.h.": DECODER,
    "transformer.wte.": EMBEDDING,
}


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: QwenVLConfig) -> EmbeddingSizes:
    """Sizes that follow from the configuration alone."""
    text, vision = config.text_config, config.vision_config
    return EmbeddingSizes(
        parts=parts_of(hub_shapes(config), _PARTS, is_table=lambda name: ".wte." in name),
        cache_per_token=2 * text.hidden_size * text.num_hidden_layers,
        head_dim=text.head_dim,
        largest_picture=facts(config, vision.image_size, vision.image_size),
        once_a_picture=(),
        text=text,
        patches=vision.num_patches,
        width=vision.width,
        intermediate_size=vision.intermediate_size,
        # states; what they become, with positions; keys and values
        behind=vision.width + 5 * text.hidden_size,
    )
