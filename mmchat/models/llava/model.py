"""LLaVA-1.5: CLIP's vision encoder, a projector and Llama 2 together.

Parameter names are those of the Hub's checkpoints. Source of the architecture: Liu et al. 2023,
Improved baselines with visual instruction tuning, and the reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mmchat.models.embedding_model import EmbeddingModel, LayerKind
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.tensor_names import unused
from mmchat.models.llava.text import TextModel
from mmchat.models.llava.vision import Projector, VisionLayer, VisionTower
from mmchat.nn.decoder import LanguageModel, SelfAttentionLayer
from mmchat.nn.kv_cache import Past


class LlavaForConditionalGeneration(EmbeddingModel):
    """Answers text about pictures. Weights load by the Hub's names."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(TextModel(config.text_config), config.text_config)

    def encode_slices(self, pixels: Tensor, embeddings: list[Tensor]) -> Iterator[None]:
        features: list[Tensor] = []
        yield from self.vision_tower.slices(pixels, features)
        embeddings.append(self.multi_modal_projector(features.pop()))

    def is_unused(self, name: str) -> bool:
        return name.startswith(unused(self.config))

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.language_model.model.embed(token_ids)

    def decode(
        self, x: Tensor, positions: Tensor, past: Sequence[Past], *of_tokens: Tensor
    ) -> Tensor:
        return self.language_model.model(x, positions, past)

    def layer_kinds(self) -> list[LayerKind]:
        vision = self.config.vision_config
        picture = (1, vision.num_patches + 1, vision.hidden_size)
        rotary = self.language_model.model.rotary
        of_text = self.decoder_kinds(SelfAttentionLayer, rotary)
        return [*of_text, self.picture_kind(VisionLayer, picture)]
