"""How large a LLaVA is and how much memory it works in. Pure arithmetic, in bytes and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.squares import facts
from mmchat.models.llava.tensor_names import hub_shapes, is_unused
from mmchat.models.prompt import MediaFacts
from mmchat.models.sizes import PartName, Sizes, decoder_pass_bytes, parts_of


@dataclass(frozen=True)
class LlavaSizes(Sizes):
    """Sizes of one LLaVA: a picture takes positions, and embeddings until these are read."""

    config: LlavaConfig

    def picture_numbers(self, picture: MediaFacts) -> int:
        return picture.positions * self.config.text_config.hidden_size

    def encode_bytes(
        self, picture: MediaFacts, item_bytes: int, *, wide_products: bool = False
    ) -> int:
        vision, width = self.config.vision_config, self.config.text_config.hidden_size
        size, inner = vision.hidden_size, vision.intermediate_size
        # the sum so far, its norm, query, key, value and what they give; or the widths of the MLP
        in_layer = max(6 * size, 2 * size + 3 * inner)
        numbers = (vision.num_patches + 1) * max(in_layer, size + 3 * width)
        wide = 4 * (vision.num_patches + 1) * (max(size, width) + inner) if wide_products else 0
        return numbers * item_bytes + wide

    def prefill_bytes(
        self, prompt: int, item_bytes: int, *, pictures: bool, wide_products: bool = False
    ) -> int:
        return decoder_pass_bytes(
            self.config.text_config,
            prompt,
            item_bytes,
            pictures=pictures,
            wide_products=wide_products,
        )


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: LlavaConfig) -> LlavaSizes:
    """Sizes that follow from the configuration alone."""
    text = config.text_config
    side = config.vision_config.image_size
    return LlavaSizes(
        parts=parts_of(
            hub_shapes(config),
            lambda name: _part_of(name, config),
            is_table=lambda name: "embed" in name,
        ),
        cache_per_token=2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers,
        largest_picture=facts(config, side, side),
        once_a_picture=(),
        config=config,
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
