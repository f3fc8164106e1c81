"""Mllama (Llama 3.2 Vision), as the registry knows it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mmchat.models.family import Alpha, Description, Family, Translated
from mmchat.models.mllama import gguf_format, meta_format, tiling, translate
from mmchat.models.mllama.config import MllamaConfig, parse
from mmchat.models.mllama.footprint import footprint
from mmchat.models.mllama.tensor_names import hf_shapes, hub_name
from mmchat.parallel.slices import Cut, decoder_cuts, encoder_cuts
from mmchat.strict_json import Where
from mmchat.words import size

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

    from mmchat.conversation import Image
    from mmchat.models.mllama.build import MllamaBuild


class MllamaFamily(Family[MllamaConfig, Any]):
    """See mmchat.models.family.Family."""

    model_type = "mllama"
    ollama_name = "llama3.2-vision"
    released_dtype = "bfloat16"
    program_formats = ("aoti", "executorch")
    generation = MappingProxyType({"temperature": 0.6, "top_p": 0.9})
    config_type = MllamaConfig
    parse = staticmethod(parse)
    hub_documents = staticmethod(translate.hub_documents)
    sizes = staticmethod(footprint)
    from_makers = staticmethod(meta_format.from_makers)
    from_gguf = staticmethod(gguf_format.from_gguf)
    shapes = staticmethod(hf_shapes)
    facts = staticmethod(tiling.facts)
    patches = staticmethod(tiling.patches)
    picture_size = staticmethod(tiling.picture_size)
    hub_name = staticmethod(hub_name)
    shard_axis = staticmethod(meta_format.shard_dims)

    @staticmethod
    def from_hub(
        found: Mapping[str, Any],
        preprocessor: Mapping[str, Any] | None,
        where: Where,
        preprocessor_where: Where,
    ) -> Translated[MllamaConfig]:
        text_only = found.get("model_type") == "mllama_text_model"  # which is flat
        whole = {"text_config": found} if text_only else found
        config = translate.from_hf_config(whole, preprocessor, where, preprocessor_where)
        fit = partial(translate.fitted, config) if config.text_config.resized else None
        return Translated(config, is_chat=None, text_only=text_only, fit=fit)

    @staticmethod
    def cuts(config: MllamaConfig) -> dict[str, Cut]:
        text, vision = config.text_config, config.vision_config
        heads, inner = vision.attention_heads, vision.intermediate_size
        return {
            **decoder_cuts("language_model.", text),
            **encoder_cuts("vision_model.", heads, vision.head_dim, inner),
            "multi_modal_projector": Cut(0, (text.hidden_size,), gathered="all"),
        }

    def describe(self, config: MllamaConfig) -> Description:
        vision, text = config.vision_config, config.text_config
        tile_bytes = 2 * footprint(config).cache_per_tile
        own, cross = len(text.self_attention_layers), len(text.cross_attention_layers)
        tiles = f"tiles of {vision.image_size} px"
        return Description(
            image_size=vision.image_size,
            pictures=tiles,
            lines=(
                (
                    "vision",
                    f"{vision.num_hidden_layers} + {vision.num_global_layers} layers of"
                    f" {vision.hidden_size:,}; up to {vision.max_num_tiles} {tiles},"
                    f" {vision.tokens_per_tile:,} tokens each",
                ),
                (
                    "text",
                    f"{own} self- and {cross} cross-attention layers of {text.hidden_size:,};"
                    f" {text.vocab_size:,} tokens, context {text.max_position_embeddings:,}",
                ),
            ),
            details={
                "vision": {
                    "layers": vision.num_hidden_layers,
                    "global_layers": vision.num_global_layers,
                    "hidden_size": vision.hidden_size,
                    "tile_size": vision.image_size,
                    "patch_size": vision.patch_size,
                    "max_num_tiles": vision.max_num_tiles,
                    "tokens_per_tile": vision.tokens_per_tile,
                },
                "text": {
                    "self_attention_layers": own,
                    "cross_attention_layers": cross,
                    "hidden_size": text.hidden_size,
                    "vocab_size": text.vocab_size,
                    "context": text.max_position_embeddings,
                },
            },
            cache_lines=(("pictures", f"{size(tile_bytes)} a tile in bfloat16"),),
            cache_details={"cache_bytes_per_tile": tile_bytes},
            sees_earlier=False,
        )

    def draw(self, config: MllamaConfig, image: Image) -> Drawing:
        from mmchat.models.mllama.tile_preview import draw_tile_preview

        return draw_tile_preview(image, config.vision_config)

    def alpha(self, config: MllamaConfig, checkpoint_format: str) -> Alpha:
        rule = config.image_processor.alpha
        if rule == "checkpoint":
            return "drop" if checkpoint_format == "meta" else "white"
        return rule

    def build(self) -> MllamaBuild:
        from mmchat.models.mllama.build import MllamaBuild

        return MllamaBuild()
