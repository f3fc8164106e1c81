"""LLaVA-1.5, as the registry knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mmchat.models.family import Alpha, Description, Translated
from mmchat.models.llava import params, squares, translate
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.footprint import footprint
from mmchat.models.llava.tensor_names import hub_shapes
from mmchat.models.prompt import MediaFacts
from mmchat.strict_json import Where
from mmchat.words import size

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image
    from mmchat.models.llava.build import LlavaBuild
    from mmchat.tokenizers.base import Tokenizer


class LlavaFamily:
    """See mmchat.models.family.Family."""

    model_type = "llava"
    ollama_name = "llava"
    sections = params.SECTIONS
    program_formats = ()
    generation = MappingProxyType({"temperature": 0.2, "top_p": 1.0})
    parse = staticmethod(params.parse)
    to_sections = staticmethod(params.to_sections)
    shapes = staticmethod(hub_shapes)
    sizes = staticmethod(footprint)

    def from_hub(
        self,
        found: Mapping[str, Any],
        preprocessor: Mapping[str, Any] | None,
        where: Where,
        preprocessor_where: Where,
    ) -> Translated[LlavaConfig]:
        config = translate.from_hub(found, preprocessor, where, preprocessor_where)
        return Translated(config, is_chat=True)

    def from_makers(self, found: Mapping[str, Any], folders: str, where: Where) -> None:
        return None

    def from_gguf(self, found: Mapping[str, Any], where: Where) -> None:
        return None

    def companion(self, config: LlavaConfig) -> str | None:
        return config.features.tower

    def hub_documents(
        self,
        config: LlavaConfig,
        tokenizer: Tokenizer,
        *,
        is_chat: bool,
        dtype: str,
        generation: Mapping[str, float],
    ) -> dict[str, dict[str, Any]]:
        from mmchat.models.llava.documents import hub_documents

        return hub_documents(config, tokenizer, dtype, generation)

    def describe(self, config: LlavaConfig) -> Description:
        vision, text = config.vision_config, config.text_config
        side, count = vision.image_size, config.positions_per_image
        square = f"squares of {side} px"
        kept = 2 * footprint(config).picture_numbers(squares.facts(config, side, side))
        positions = 2 * footprint(config).cache_per_token * count
        used = config.vision_layers_used
        return Description(
            image_size=side,
            pictures=square,
            lines=(
                (
                    "vision",
                    f"{used} of {vision.num_hidden_layers} layers of {vision.hidden_size:,};"
                    f" {square}, {count:,} positions each",
                ),
                (
                    "text",
                    f"{text.num_hidden_layers} layers of {text.hidden_size:,};"
                    f" {text.vocab_size:,} tokens, context {text.max_position_embeddings:,}",
                ),
            ),
            details={
                "vision": {**asdict(vision), "layers_used": used, "positions_per_image": count},
                "text": asdict(text),
                "square": config.image_processor.square,
                "vision_tower": config.features.tower,
            },
            cache_lines=(
                ("pictures", f"{size(positions)} each in bfloat16, {size(kept)} more until read"),
            ),
            cache_details={"cache_bytes_per_picture": positions, "bytes_per_picture": kept},
        )

    def facts(self, config: LlavaConfig, height: int, width: int) -> MediaFacts:
        return squares.facts(config, height, width)

    def draw(self, config: LlavaConfig, image: Image) -> Drawing:
        from mmchat.models.llava.preview import draw_preview

        return draw_preview(image, config)

    def picture_size(self, config: LlavaConfig, cells: int) -> tuple[int, int] | None:
        side = config.vision_config.image_size
        return (side, side) if cells == 1 else None

    def alpha(self, config: LlavaConfig, checkpoint_format: str) -> Alpha:
        return config.image_processor.alpha

    def with_alpha(self, config: LlavaConfig, alpha: Alpha) -> LlavaConfig:
        return replace(config, image_processor=replace(config.image_processor, alpha=alpha))

    def shard_axis(self, name: str) -> None:
        return None

    def build(self) -> LlavaBuild:
        from mmchat.models.llava.build import LlavaBuild

        return LlavaBuild()
