"""LLaVA-1.5: CLIP's vision encoder, a projector and Llama 2 together.

Parameter names are those of the Hub's checkpoints. Source of the architecture: Liu et al. 2023,
Improved baselines with visual instruction tuning, and the reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmchat.models.base import Block, Cache
from mmchat.models.embedding_cache import EmbeddingCache, own
from mmchat.models.embedding_model import EmbeddingModel
from mmchat.models.llava.blocks import compilable_blocks
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.tensor_names import is_unused
from mmchat.models.llava.text import LanguageModel
from mmchat.models.llava.vision import Projector, VisionTower
from mmchat.models.prompt import Media
from mmchat.nn.decoder import SelfAttention
from mmchat.nn.kv_cache import Past
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import GatedMLP


class LlavaForConditionalGeneration(EmbeddingModel):
    """Answers text about pictures. Weights load by the Hub's names."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config)
        self.remarks: list[str] = []

    @property
    def like(self) -> Tensor:
        """A tensor of the model's device and dtype."""
        return self.language_model.model.norm.weight

    def new_cache(self, slots: int, positions: int) -> EmbeddingCache:
        """An empty cache of so many rows, with room for `positions` in each."""
        text = self.config.text_config
        return EmbeddingCache(
            layers=text.num_hidden_layers,
            groups=text.num_key_value_heads,
            head_dim=text.head_dim,
            slots=slots,
            positions=positions,
            like=self.like,
            fixed=self.like.is_cuda,
        )

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        """Put the first picture into the cache, by itself; each next() computes one layer."""
        [pixels] = media[0].tensors
        features: list[Tensor] = []
        for _ in self.vision_tower.slices(pixels[None].to(self.like), features):
            yield media[:1]
        own(cache).encoded[media[0].content_hash] = self.multi_modal_projector(features.pop())[0]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.language_model.model.embed(token_ids)

    def decode(
        self, x: Tensor, positions: Tensor, past: Sequence[Past], *of_tokens: Tensor
    ) -> Tensor:
        return self.language_model.model(x, positions, past)

    def head(self, hidden: Tensor) -> Tensor:
        return self.language_model.lm_head(hidden)

    def blocks(self) -> list[Block]:
        """The kinds of layer that are worth compiling, of those that are loaded."""
        return compilable_blocks(self)

    def weight_names(self, *, text_only: bool) -> set[str]:
        """Names of the weights to load: no layer behind the features, no vision for text alone."""
        return {
            name
            for name in self.state_dict()
            if not is_unused(name, self.config)
            and (name.startswith("language_model.") or not text_only)
        }

    def linear_parts(self) -> dict[str, str]:
        """Which part each linear layer belongs to: "text", "head" or "vision"."""
        parts = {"language_model.model": "text", "language_model.lm_head": "head"}
        return {
            name: next((p for start, p in parts.items() if name.startswith(start)), "vision")
            for name, module in self.named_modules()
            if isinstance(module, Linear) and not is_unused(f"{name}.", self.config)
        }

    def fuse_projections(self) -> None:
        """Join the projections that read the same input, once the weights are loaded."""
        for module in self.modules():
            if isinstance(module, SelfAttention | GatedMLP):
                module.fuse_projections()

    def finish_loading(self, device: torch.device) -> None:
        """Once the weights are there: the frequencies were computed when the model was built."""
        rotary = self.language_model.model.rotary
        rotary.inv_freq = rotary.inv_freq.to(device)
