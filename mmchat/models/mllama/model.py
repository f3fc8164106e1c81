"""Mllama (Llama 3.2 Vision): the vision encoder, the projector and the text decoder together.

Parameter names are those of the Hub's checkpoints. Source of the architecture: Llama 3 herd of
models (2024), section 7, and Meta's reference implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmchat.models.base import Block
from mmchat.models.mllama.blocks import compilable_blocks
from mmchat.models.mllama.cache import MllamaCache, PlacedImage
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.text import (
    CrossAttentionLayer,
    CrossSegment,
    KeyValue,
    LanguageModel,
    SelfAttention,
)
from mmchat.models.mllama.vision import VisionModel
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import GatedMLP

if TYPE_CHECKING:
    from mmchat.models.mllama.image_processor import TiledImage


@dataclass(frozen=True, eq=False)
class MllamaInputs:
    """New positions of a batch.

    input_ids: [B, S], rows padded on the right. lengths: real positions of each row.
    images: for each row, (position of its image token in the whole text, picture), in order.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    images: tuple[tuple[tuple[int, TiledImage], ...], ...]


class MllamaForConditionalGeneration(nn.Module):
    """Answers text about pictures. Weights load by the Hub's names."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config.vision_config)
        self.multi_modal_projector = Linear(
            config.vision_config.output_dim, config.text_config.hidden_size
        )
        self.language_model = LanguageModel(config.text_config)
        self.remarks: list[str] = []  # what is unusual about the loaded weights

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    def new_cache(self, batch: int, capacity: int) -> MllamaCache:
        """An empty cache for `batch` rows with room for `capacity` positions."""
        return MllamaCache(self.config.text_config, batch, capacity, self.device, self.dtype)

    def vision_states(self, tiles: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """What the text sees of pictures with equal tile counts.

        tiles: [I, T, C, S, S], aspect_ratio_ids: [I] -> [I, T·P, E].
        """
        return self.multi_modal_projector(self.vision_model(tiles, aspect_ratio_ids))

    def cross_key_values(self, states: Tensor) -> list[KeyValue]:
        """Vision states [I, N, E] -> keys and values [I, G, N, D] for each cross layer."""
        return [
            layer.cross_attn.key_value(states)
            for layer in self.language_model.model.layers
            if isinstance(layer, CrossAttentionLayer)
        ]

    def forward(
        self,
        input_ids: Tensor,
        segments: Sequence[CrossSegment] = (),
        states: Sequence[Tensor] = (),
    ) -> Tensor:
        """Logits of every position, without a cache; differentiable.

        input_ids: [B, S]. states: vision states [N, E] of the pictures that the segments index.
        -> float32 [B, S, V]
        """
        images = self._images_by_layer(states)
        hidden = self.language_model.model(input_ids, segments, images)
        return self.language_model.lm_head(hidden).float()

    def _images_by_layer(self, states: Sequence[Tensor]) -> list[list[KeyValue]]:
        """Project pictures of equal size together: [layer][picture] -> [G, N, D] twice."""
        if states and all(s.shape == states[0].shape for s in states):
            layers = self.cross_key_values(torch.stack(tuple(states)))
            return [list(zip(key, value, strict=True)) for key, value in layers]
        each = [self.cross_key_values(s[None]) for s in states]
        return [[(k[0], v[0]) for k, v in layer] for layer in zip(*each, strict=True)]

    @torch.inference_mode()
    def encode_images(self, inputs: MllamaInputs, cache: MllamaCache) -> int:
        """Encode the pictures of `inputs` that the cache does not hold; how many there were."""
        encoded = 0
        for _, image in (placed for row in inputs.images for placed in row):
            if image.content_hash in cache.encoded:
                cache.encoded.move_to_end(image.content_hash)
                continue
            tiles = image.pixel_values[None].to(self.device, self.dtype)
            ratio = torch.tensor([image.layout.aspect_ratio_id], device=self.device)
            key_values = self.cross_key_values(self.vision_states(tiles, ratio))
            cache.add_encoded(image.content_hash, [(k[0], v[0]) for k, v in key_values])
            encoded += 1
        return encoded

    @torch.inference_mode()
    def prefill(self, inputs: MllamaInputs, cache: MllamaCache) -> Tensor:
        """Read new positions; float32 logits [B, V] of each row's last one.

        The rows of a batch start together: at 0, or all at the same length.
        """
        start = cache.length
        if min(cache.lengths) != start:
            raise ValueError(f"rows of lengths {cache.lengths} cannot be continued together")
        self.encode_images(inputs, cache)
        cache.reserve(start + inputs.input_ids.shape[1])
        for row, images in enumerate(inputs.images):
            cache.place(row, [PlacedImage(at, image.content_hash) for at, image in images])
        segments, images = cache.segments(start, inputs.lengths)
        text = self.language_model.model
        hidden = text(inputs.input_ids.to(self.device), segments, images, cache.layers, start)
        rows = torch.arange(len(inputs.lengths), device=self.device)
        last = torch.tensor(inputs.lengths, device=self.device) - 1
        cache.advance(inputs.lengths)
        return self.language_model.lm_head(hidden[rows, last]).float()

    @torch.inference_mode()
    def decode(self, token_ids: Tensor, cache: MllamaCache) -> Tensor:
        """Read one more token a row, token_ids: [B, 1]; float32 logits [B, V]."""
        return self.verify(token_ids, cache)[:, -1]

    @torch.inference_mode()
    def verify(self, token_ids: Tensor, cache: MllamaCache) -> Tensor:
        """Read the next tokens of each row, token_ids: [B, S]; float32 logits [B, S, V] of all.

        None of them is an image token.
        """
        count = token_ids.shape[1]
        cache.reserve(cache.length + count)
        images = cache.decode_images()
        logits = self.verify_step(
            token_ids,
            cache.positions,
            [(layer.key, layer.value) for layer in cache.layers],
            images.key_values if images else None,
            images.mask if images else None,
            images.sees_images if images else None,
        )
        cache.advance_all(count)
        return logits

    def decode_step(self, token_ids: Tensor, /, *tensors: Any) -> Tensor:
        """`decode` as a function of tensors with static shapes; arguments as of `verify_step`."""
        return self.verify_step(token_ids, *tensors)[:, -1]

    def verify_step(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cached: Sequence[KeyValue],
        cross: Sequence[KeyValue] | None,
        cross_mask: Tensor | None = None,
        sees_images: Tensor | None = None,
    ) -> Tensor:
        """`verify` as a function of tensors with static shapes; arguments as in TextModel.step."""
        hidden = self.language_model.model.step(
            token_ids, positions, cached, cross, cross_mask, sees_images
        )
        return self.language_model.lm_head(hidden).float()

    def blocks(self) -> list[Block]:
        """The kinds of layer that are worth compiling, of those that are loaded."""
        return compilable_blocks(self)

    def weight_names(self, *, text_only: bool) -> set[str]:
        """Names of the weights to load; without pictures no cross-attention layer is used."""
        cross = {
            f"language_model.model.layers.{i}"
            for i in self.config.text_config.cross_attention_layers
        }
        names = set(self.state_dict())
        if not text_only:
            return names
        return {
            name
            for name in names
            if name.startswith("language_model.") and ".".join(name.split(".")[:4]) not in cross
        }

    def linear_parts(self) -> dict[str, str]:
        """Which part each linear layer belongs to: "text", "head" or "vision"."""
        parts = {"language_model.model": "text", "language_model.lm_head": "head"}
        return {
            name: next((p for start, p in parts.items() if name.startswith(start)), "vision")
            for name, module in self.named_modules()
            if isinstance(module, Linear)
        }

    def fuse_projections(self) -> None:
        """Join the projections that read the same input, once the weights are loaded."""
        for module in self.modules():
            if isinstance(module, SelfAttention | GatedMLP):
                module.fuse_projections()

    def finish_loading(self, device: torch.device) -> None:
        """Once the weights are there: what is in no checkpoint, and what follows from them."""
        rotary = self.language_model.model.rotary
        rotary.inv_freq = rotary.inv_freq.to(device)  # computed when the model is built
        if not self.vision_model.class_embedding.is_meta:
            self.vision_model.finish_loading()
            if not self.vision_model.padding_is_equal:
                self.remarks.append(
                    "the tile tables are not zero where a canvas has no tile, as after training in"
                    " transformers: padding tiles are computed one by one"
                )
