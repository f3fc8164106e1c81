"""Qwen-VL: a vision encoder, a resampler and Qwen-7B together.

Parameter names are those of the Hub's checkpoints. Source of the architecture: Bai et al. 2023,
Qwen-VL, and the reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmchat.models.embedding_model import EmbeddingCache, EmbeddingModel, LayerKind
from mmchat.models.prompt import Prompt
from mmchat.models.qwen_vl.config import QwenVLConfig, TextConfig
from mmchat.models.qwen_vl.tensor_names import VISION
from mmchat.models.qwen_vl.text import DecoderLayer, TextModel
from mmchat.models.qwen_vl.vision import VisionLayer, VisionModel
from mmchat.nn.kv_cache import Past
from mmchat.nn.linear import Linear
from mmchat.nn.rope import inverse_frequencies


class QwenVLCache(EmbeddingCache):
    """of_rows: the inverse frequencies [slots, D/2] that the row's prompt is rotated by."""

    def __init__(self, config: TextConfig, slots: int, *sizes: Any, **how: Any) -> None:
        super().__init__(config, slots, *sizes, **how)
        self.config, self.alphas = config, [0] * slots
        with torch.inference_mode(False):  # whoever makes it, others write it
            self.of_rows = (self.positions.new_zeros(slots, config.head_dim // 2).float(),)

    def begin(self, slot: int, prompt: Prompt) -> None:
        """Raises ValueError if what the slot holds is rotated otherwise."""
        alpha, held = self.config.alpha(len(prompt.token_ids)), self.alphas[slot]
        if alpha != held and self.lengths[slot]:
            raise ValueError(f"slot {slot} was read with alpha {held}, not {alpha}")
        base = self.config.rotary_base(alpha)
        self.of_rows[0][slot] = inverse_frequencies(self.config.head_dim, base).to(self.of_rows[0])
        self.alphas[slot] = alpha
        super().begin(slot, prompt)

    def copy(self, source: int, target: int, length: int) -> None:
        super().copy(source, target, length)
        self.of_rows[0][target] = self.of_rows[0][source]
        self.alphas[target] = self.alphas[source]


class TransformerModel(TextModel):
    """The text model, among whose parameters those of vision are."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config.text_config)
        self.visual = VisionModel(config)


class QwenVLForConditionalGeneration(EmbeddingModel):
    """Answers text about pictures. Weights load by the Hub's names."""

    cache_type = QwenVLCache

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = TransformerModel(config)
        self.lm_head = Linear(config.text_config.hidden_size, config.vocab_size, bias=False)

    @property
    def like(self) -> Tensor:
        return self.transformer.ln_f.weight

    def encode_slices(self, pixels: Tensor, embeddings: list[Tensor]) -> Iterator[None]:
        return self.transformer.visual.slices(pixels, embeddings)

    def is_vision(self, name: str) -> bool:
        return name.startswith(VISION)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.transformer.wte(token_ids)

    def decode(
        self, x: Tensor, positions: Tensor, past: Sequence[Past], *of_tokens: Tensor
    ) -> Tensor:
        [inv_freq] = of_tokens
        return self.transformer(x, positions, past, inv_freq)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def layer_kinds(self) -> list[LayerKind]:
        text, vision = self.config.text_config, self.config.vision_config
        inv_freq = inverse_frequencies(text.head_dim, text.rotary_emb_base).to(self.like.device)
        of_text = self.decoder_kinds(DecoderLayer, lambda at: self.transformer.turned(at, inv_freq))
        picture = (1, vision.num_patches, vision.width)
        return [*of_text, self.picture_kind(VisionLayer, picture)]
