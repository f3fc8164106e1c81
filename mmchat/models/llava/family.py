"""LLaVA-1.5, as the registry knows it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mmchat.models.family import Translated
from mmchat.models.llava import params, squares, translate
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.footprint import footprint
from mmchat.models.llava.tensor_names import hub_name, hub_shapes
from mmchat.models.prompt import MediaFacts
from mmchat.models.sizes import EmbeddingSizes
from mmchat.models.square_family import SquareFamily
from mmchat.parallel.slices import Cut, decoder_cuts, encoder_cuts, hidden
from mmchat.strict_json import Where

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image
    from mmchat.models.llava.build import LlavaBuild
    from mmchat.tokenizers.base import Tokenizer


class LlavaFamily(SquareFamily[LlavaConfig]):
    """See mmchat.models.family.Family."""

    model_type = "llava"
    ollama_name = "llava"
    released_dtype: Literal["bfloat16", "float16"] = "float16"
    sections = params.SECTIONS
    generation = MappingProxyType({"temperature": 0.2, "top_p": 1.0})
    parse = staticmethod(params.parse)
    to_sections = staticmethod(params.to_sections)
    shapes = staticmethod(hub_shapes)
    hub_name = staticmethod(hub_name)

    def sizes(self, config: LlavaConfig) -> EmbeddingSizes:
        return footprint(config)

    def from_hub(
        self,
        found: Mapping[str, Any],
        preprocessor: Mapping[str, Any] | None,
        where: Where,
        preprocessor_where: Where,
    ) -> Translated[LlavaConfig]:
        config = translate.from_hub(found, preprocessor, where, preprocessor_where)
        return Translated(config, is_chat=True)

    def cuts(self, config: LlavaConfig) -> dict[str, Cut]:
        text, vision = config.text_config, config.vision_config
        heads, inner = vision.num_attention_heads, vision.intermediate_size
        return {
            **decoder_cuts("language_model.", text),
            **encoder_cuts("vision_tower.", heads, vision.head_dim, inner),
            "multi_modal_projector.linear_1": hidden(text.hidden_size),
            "multi_modal_projector.linear_2": hidden(text.hidden_size).columns,
        }

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

    def vision_words(self, config: LlavaConfig) -> str:
        vision = config.vision_config
        used = config.vision_layers_used
        return f"{used} of {vision.num_hidden_layers} layers of {vision.hidden_size:,}"

    def details(self, config: LlavaConfig, positions: int) -> dict[str, Any]:
        found = super().details(config, positions)
        found["vision"]["layers_used"] = config.vision_layers_used
        pictures = {"square": config.image_processor.square, "vision_tower": config.features.tower}
        return {**found, **pictures}

    def facts(self, config: LlavaConfig, height: int, width: int) -> MediaFacts:
        return squares.facts(config, height, width)

    def draw(self, config: LlavaConfig, image: Image) -> Drawing:
        from mmchat.models.llava.preview import draw_preview

        return draw_preview(image, config)

    def build(self) -> LlavaBuild:
        from mmchat.models.llava.build import LlavaBuild

        return LlavaBuild()
