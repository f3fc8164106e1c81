"""Qwen-VL, as the registry knows it."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from mmchat.models.qwen_vl import translate
from mmchat.models.qwen_vl.config import QwenVLConfig, facts, parse
from mmchat.models.qwen_vl.tensor_names import cuts, footprint, hub_name, hub_shapes
from mmchat.models.square_family import SquareFamily

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image
    from mmchat.models.qwen_vl.build import QwenVLBuild


class QwenVLFamily(SquareFamily[QwenVLConfig]):
    """See mmchat.models.family.Family."""

    model_type = "qwen_vl"
    ollama_name = None
    released_dtype = "bfloat16"
    takes_packed = False
    generation = MappingProxyType({"temperature": 1.0, "top_p": 0.3})
    config_type = QwenVLConfig
    parse = staticmethod(parse)
    sizes = staticmethod(footprint)
    facts = staticmethod(facts)
    from_hub = staticmethod(translate.from_hub)
    hub_documents = staticmethod(translate.hub_documents)
    shapes = staticmethod(hub_shapes)
    hub_name = staticmethod(hub_name)
    cuts = staticmethod(cuts)

    def vision_words(self, config: QwenVLConfig) -> str:
        vision = config.vision_config
        return f"{vision.layers} layers of {vision.width:,} and a resampler"

    def text_words(self, config: QwenVLConfig) -> str:
        trained = config.text_config.seq_length
        return f"{super().text_words(config)}, of which {trained:,} were trained"

    def drawn(self, config: QwenVLConfig, image: Image) -> Drawing:
        from mmchat.models.preview import SQUARE
        from mmchat.models.qwen_vl.processor import square_pixels

        return square_pixels(image, config).resize((SQUARE, SQUARE))

    def build(self) -> QwenVLBuild:
        from mmchat.models.qwen_vl.build import QwenVLBuild

        return QwenVLBuild()
