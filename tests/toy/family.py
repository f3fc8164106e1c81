"""The toy family as the registry knows it: what can be said of it without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from PIL.Image import Image as Drawing
from PIL.Image import Resampling

from mmchat.conversation import Image
from mmchat.models.family import Alpha, Description, Translated
from mmchat.models.prompt import MediaFacts
from mmchat.models.sizes import PartName, Sizes, parts_of
from mmchat.parallel.slices import Cut
from mmchat.strict_json import Where, check_keys, parse_dataclass
from mmchat.tokenizers.base import Tokenizer
from tests.toy.config import ToyConfig

if TYPE_CHECKING:
    from tests.toy.build import ToyBuild

Shape = tuple[int, ...]
# First part of a weight's name -> name, kind and reading of the part of the model.
_PARTS: dict[str, PartName] = {
    "vision": ("picture encoder", "vision", "seldom"),
    "layers": ("decoder", "text", "token"),
    "embed_tokens": ("token embedding", "embedding", "seldom"),
    "lm_head": ("head", "head", "token"),
    "norm": ("head", "head", "token"),
}


@dataclass(frozen=True)
class ToySizes(Sizes):
    """A picture takes positions, and embeddings until these are read."""

    config: ToyConfig

    def picture_numbers(self, picture: MediaFacts) -> int:
        return picture.positions * self.config.hidden_size

    def encode_bytes(
        self, picture: MediaFacts, item_bytes: int, *, wide_products: bool = False
    ) -> int:
        width = 2 * self.config.hidden_size + 2 * self.config.intermediate_size
        return picture.positions * width * (item_bytes + 4 * wide_products)

    def prefill_bytes(
        self, prompt: int, item_bytes: int, *, pictures: bool, wide_products: bool = False
    ) -> int:
        width = 4 * self.config.hidden_size + 3 * self.config.intermediate_size
        logits = 2 * 4 * self.config.vocab_size
        return prompt * width * (item_bytes + 4 * wide_products) + logits


class ToyFamily:
    """See mmchat.models.family.Family."""

    model_type = "toy"
    ollama_name = None
    released_dtype = "bfloat16"
    sections = ("toy",)
    program_formats = ("aoti",)
    takes_packed = False
    generation = MappingProxyType({"temperature": 0.5, "top_p": 0.8})

    def parse(self, sections: Mapping[str, Any], where: Where) -> ToyConfig:
        check_keys(sections, self.sections, (), where)
        return parse_dataclass(ToyConfig, sections["toy"], where.child("toy"), {})

    def to_sections(self, config: ToyConfig) -> dict[str, Any]:
        return {"toy": asdict(config)}

    def from_hub(
        self,
        found: Mapping[str, Any],
        preprocessor: Mapping[str, Any] | None,
        where: Where,
        preprocessor_where: Where,
    ) -> Translated[ToyConfig]:
        config = parse_dataclass(ToyConfig, found["toy"], where.child("toy"), {})
        return Translated(config, found["is_chat"])

    def from_makers(self, found: Mapping[str, Any], folders: str, where: Where) -> None:
        return None

    def from_gguf(self, found: Mapping[str, Any], where: Where) -> None:
        return None

    def companion(self, config: ToyConfig) -> None:
        return None

    def hub_documents(
        self,
        config: ToyConfig,
        tokenizer: Tokenizer,
        *,
        is_chat: bool,
        dtype: str,
        generation: Mapping[str, float],
    ) -> dict[str, dict[str, Any]]:
        own = {"model_type": "toy", "architectures": ["ToyModel"], "is_chat": is_chat}
        return {"config.json": {**own, **self.to_sections(config)}}

    def hub_name(self, name: str) -> str:
        return name

    def shapes(self, config: ToyConfig) -> dict[str, Shape]:
        width, inner = config.hidden_size, config.intermediate_size
        keys = config.num_key_value_heads * config.head_dim
        layer: dict[str, Shape] = {f"{name}_proj.weight": (width, width) for name in "qo"}
        layer |= {f"{name}_proj.weight": (keys, width) for name in "kv"}
        layer |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        layer |= {"mlp.down_proj.weight": (width, inner)}
        layer |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes: dict[str, Shape] = {
            "vision.patch_embedding.weight": (width, 3 * config.patch_size**2),
            "vision.patch_embedding.bias": (width,),
            "vision.position_embedding": (config.positions_per_image, width),
            "vision.mlp.fc1.weight": (inner, width),
            "vision.mlp.fc1.bias": (inner,),
            "vision.mlp.fc2.weight": (width, inner),
            "vision.mlp.fc2.bias": (width,),
            "embed_tokens.weight": (config.vocab_size, width),
            "norm.weight": (width,),
            "lm_head.weight": (config.vocab_size, width),
        }
        for i in range(config.num_hidden_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def sizes(self, config: ToyConfig) -> ToySizes:
        keys_and_values = 2 * config.num_key_value_heads * config.head_dim
        return ToySizes(
            parts=parts_of(
                self.shapes(config),
                _PARTS,
                is_table=lambda name: name.startswith("embed_tokens"),
            ),
            cache_per_token=keys_and_values * config.num_hidden_layers,
            head_dim=config.head_dim,
            largest_picture=config.facts(config.image_size, config.image_size),
            once_a_picture=(),
            config=config,
        )

    def describe(self, config: ToyConfig) -> Description:
        patches = f"{config.positions_per_image} patches of {config.patch_size} px"
        kept = 2 * config.positions_per_image * config.hidden_size
        return Description(
            image_size=config.image_size,
            pictures=patches,
            lines=(("toy", f"{config.num_hidden_layers} layers, {patches} a picture"),),
            details={"toy": asdict(config)},
            cache_lines=(("pictures", f"{kept:,} bytes each until read"),),
            cache_details={"bytes_per_picture": kept},
        )

    def facts(self, config: ToyConfig, height: int, width: int) -> MediaFacts:
        return config.facts(height, width)

    def patches(self, config: ToyConfig, height: int, width: int) -> None:
        return None

    def draw(self, config: ToyConfig, image: Image) -> Drawing:
        size = config.image_size
        seen = image.pixels.resize((size, size), Resampling.BILINEAR)
        return seen.resize((4 * size, 4 * size), Resampling.NEAREST)

    def picture_size(self, config: ToyConfig, cells: int) -> tuple[int, int] | None:
        size = config.image_size
        return (size, size) if cells == config.positions_per_image else None

    def alpha(self, config: ToyConfig, checkpoint_format: str) -> Alpha:
        return config.alpha

    def with_alpha(self, config: ToyConfig, alpha: Alpha) -> ToyConfig:
        return replace(config, alpha=alpha)

    def shard_axis(self, name: str) -> None:
        return None

    def cuts(self, config: ToyConfig) -> dict[str, Cut]:
        return {}

    def build(self) -> ToyBuild:
        from tests.toy.build import ToyBuild

        return ToyBuild()
