"""How large an Mllama is and how much memory it works in. Pure arithmetic, in bytes and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.tensor_names import hf_shapes
from mmchat.models.mllama.tiling import facts
from mmchat.models.prompt import MediaFacts
from mmchat.models.sizes import EMBEDDING, ENCODER, PROJECTOR, DecoderSizes, PartName, parts_of

_CROSS: PartName = ("cross-attention layers", "text", "token after a picture")
_PARTS: dict[str, PartName] = {
    "vision_model.": ENCODER,
    "multi_modal_projector.": PROJECTOR,
    "language_model.model.layers.": ("self-attention layers", "text", "token"),
    "language_model.model.embed_tokens.": EMBEDDING,
}


@dataclass(frozen=True)
class MllamaSizes(DecoderSizes):
    """Sizes of one Mllama.

    cache_per_tile: numbers stored for one tile of a picture, keys and values of all layers of
    cross-attention together.
    """

    config: MllamaConfig
    cache_per_tile: int

    shares_pictures = True

    def picture_numbers(self, picture: MediaFacts) -> int:
        return self.cache_per_tile * math.prod(picture.grid)

    def encode_bytes(
        self, picture: MediaFacts, item_bytes: int, *, wide_products: bool = False
    ) -> int:
        vision, text = self.config.vision_config, self.config.text_config
        tiles = math.prod(picture.grid)
        width, inner = vision.hidden_size, vision.intermediate_size
        seen = tiles * vision.tokens_per_tile
        computed = seen + tiles
        if tiles < vision.max_num_tiles:  # one padding tile and its pad token
            computed += vision.tokens_per_tile + 1
        kept = len(vision.intermediate_layers_indices)  # states, each as long as `computed`
        # a CPU, which takes the MLP in pieces, needs less
        in_layer = computed * ((kept + 4) * width + 2 * inner)
        at_the_end = computed * kept * width + seen * (2 * kept + 2) * width
        projected = seen * (vision.output_dim + text.hidden_size)
        # states, and a key in float32 while it is normalised
        keys = seen * (text.hidden_size + 5 * text.num_key_value_heads * text.head_dim)
        numbers = max(in_layer, at_the_end, projected, keys)
        return numbers * item_bytes + (4 * computed * (width + inner) if wide_products else 0)


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: MllamaConfig) -> MllamaSizes:
    """Sizes that follow from the configuration alone."""
    shapes = hf_shapes(config)
    vision, text = config.vision_config, config.text_config
    keys_and_values = 2 * text.num_key_value_heads * text.head_dim
    crossed = [f"language_model.model.layers.{i}." for i in text.cross_attention_layers]
    return MllamaSizes(
        config=config,
        text=text,
        parts=parts_of(shapes, dict.fromkeys(crossed, _CROSS) | _PARTS),
        cache_per_token=keys_and_values * len(text.self_attention_layers),
        head_dim=text.head_dim,
        cache_per_tile=keys_and_values * len(text.cross_attention_layers) * vision.tokens_per_tile,
        largest_picture=facts(config, vision.image_size, vision.max_num_tiles * vision.image_size),
        once_a_picture=tuple(
            (shape[0], shape[1])
            for name, shape in shapes.items()
            if name.endswith(("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"))
        ),
    )
