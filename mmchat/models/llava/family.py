"""LLaVA-1.5, as the registry knows it."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mmchat.models.llava import squares, translate
from mmchat.models.llava.config import LlavaConfig, parse
from mmchat.models.llava.tensor_names import footprint, hub_name, hub_shapes
from mmchat.models.square_family import SquareFamily
from mmchat.parallel.slices import Cut, decoder_cuts, encoder_cuts, hidden

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image
    from mmchat.models.llava.build import LlavaBuild


class LlavaFamily(SquareFamily[LlavaConfig]):
    """See mmchat.models.family.Family."""

    model_type = "llava"
    ollama_name = "llava"
    released_dtype = "float16"
    generation = MappingProxyType({"temperature": 0.2, "top_p": 1.0})
    config_type = LlavaConfig
    parse = staticmethod(parse)
    from_hub = staticmethod(translate.from_hub)
    hub_documents = staticmethod(translate.hub_documents)
    sizes = staticmethod(footprint)
    facts = staticmethod(squares.facts)
    shapes = staticmethod(hub_shapes)
    hub_name = staticmethod(hub_name)

    @staticmethod
    def cuts(config: LlavaConfig) -> dict[str, Cut]:
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

    def vision_words(self, config: LlavaConfig) -> str:
        vision = config.vision_config
        used = config.vision_layers_used
        return f"{used} of {vision.num_hidden_layers} layers of {vision.hidden_size:,}"

    def details(self, config: LlavaConfig, positions: int) -> dict[str, Any]:
        found = super().details(config, positions)
        found["vision"]["layers_used"] = config.vision_layers_used
        pictures = {"square": config.image_processor.square, "vision_tower": config.features.tower}
        return {**found, **pictures}

    def drawn(self, config: LlavaConfig, image: Image) -> Drawing:
        from mmchat.models.llava.image_processor import drawn_square

        return drawn_square(image, config)

    def build(self) -> LlavaBuild:
        from mmchat.models.llava.build import LlavaBuild

        return LlavaBuild()
