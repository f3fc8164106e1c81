"""Mllama (Llama 3.2 Vision): the vision encoder, the projector and the text decoder together.

Parameter names are those of the Hub's checkpoints. Source of the architecture: Llama 3 herd of
models (2024), section 7, and Meta's reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mmchat.models.base import Batch, Cache, Example
from mmchat.models.embedding_model import DRAFT, LayerKind, UsualModel
from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.mllama.config import MllamaConfig
from mmchat.models.mllama.text import CrossAttentionLayer, SeenSteps, TextModel
from mmchat.models.mllama.vision import GatedVisionLayer, VisionLayer, VisionModel
from mmchat.models.mllama.watch import watched
from mmchat.models.prompt import Media
from mmchat.nn.attention import KeyValue, held
from mmchat.nn.decoder import LanguageModel, SelfAttentionLayer
from mmchat.nn.kv_cache import Past, past_steps
from mmchat.nn.linear import Linear

# Multiply-adds of layers of pictures that are computed before others may go on: some 30 ms of one
# CPU core. One layer of a model of billions of parameters has dozens of times as many.
SHORT_WORK = 2**30


class MllamaForConditionalGeneration(UsualModel):
    """Answers text about pictures. Weights load by the Hub's names."""

    cache_type = MllamaCache

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionModel(config.vision_config)
        self.multi_modal_projector = Linear(
            config.vision_config.output_dim, config.text_config.hidden_size
        )
        self.language_model = LanguageModel(TextModel(config.text_config), config.text_config)

    def is_for_pictures(self, name: str) -> bool:
        """Without pictures no layer of cross-attention is used."""
        crossed = self.config.text_config.cross_attention_layers
        layers = tuple(f"language_model.model.layers.{i}." for i in crossed)
        return self.is_vision(name) or name.startswith(layers)

    def vision_states(self, tiles: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """What the text sees of pictures with equal tile counts.

        tiles: [I, T, C, S, S], aspect_ratio_ids: [I] -> [I, T·P, E].
        """
        return self.multi_modal_projector(self.vision_model(tiles, aspect_ratio_ids))

    def cross_key_values(self, states: Tensor) -> list[KeyValue]:
        """Vision states [I, N, E] -> keys and values [I, G, N, D] for each cross layer."""
        return [layer.cross_attn.key_value(states) for layer in self._cross_layers()]

    def _cross_layers(self) -> list[CrossAttentionLayer]:
        layers = self.language_model.model.layers
        return [layer for layer in layers if isinstance(layer, CrossAttentionLayer)]

    def encode(self, media: Sequence[Media], cache: Cache) -> Iterator[Sequence[Media]]:
        """Put the first picture into the cache, with those of others that are cheap beside it.

        Each next() computes a layer, or more as long as that is SHORT_WORK.
        """
        group = self._encoded_together(media)
        tiles = torch.stack([one.tensors[0] for one in group]).to(self.like)
        ratios = torch.cat([one.tensors[1] for one in group]).to(self.like.device)
        of_layer = self.vision_model.layer_work(len(group), tiles.shape[1])
        features: list[Tensor] = []
        work = 0
        for _ in self.vision_model.slices(tiles, ratios, features):
            work += of_layer
            if work + of_layer > SHORT_WORK:
                yield group
                work = 0
        states = self.multi_modal_projector(features.pop())
        for one, seen in zip(group, states.split(1), strict=True):
            MllamaCache.of(cache).keep_media(one.content_hash, self.cross_key_values(seen))

    def _encoded_together(self, media: Sequence[Media]) -> Sequence[Media]:
        """The first picture and those of as many tiles, while a layer of all is SHORT_WORK.

        On a CPU: layers compiled for a GPU take one picture.
        """
        num_tiles = len(media[0].tensors[0])
        most = max(1, SHORT_WORK // self.vision_model.layer_work(1, num_tiles))
        alike = [one for one in media if len(one.tensors[0]) == num_tiles]
        return alike[: most if self.like.device.type == "cpu" else 1]

    def hidden(
        self, batch: Batch, positions: Tensor, past: Sequence[Past], cache: MllamaCache
    ) -> Tensor:
        seen = watched(cache.seen(batch), batch, cache, self._cross_layers())
        return self.language_model.model(batch.token_ids, positions, past, seen)

    def step(
        self,
        token_ids: Tensor,
        starts: Tensor,
        cached: Sequence[KeyValue],
        seen: Sequence[SeenSteps],
        length: int | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """`forward` as a function of static tensors: the next positions of R rows.

        token_ids: [R, S] at starts .. starts + S, starts: [R] -> float32 [R·S, V], or [W, V] of the
        `wanted` ones. cached: keys and values [R, G, L, D] of each self-attention layer, written in
        place. seen: one for each cross-attention layer; none skips these layers. length: how many
        of the L positions hold a row once these are written; all if None.
        """
        positions = starts[:, None] + torch.arange(token_ids.shape[1], device=starts.device)
        past = past_steps(cached, positions, length or cached[0][0].shape[2])
        text = self.language_model.model
        hidden = text(token_ids.flatten(), positions.flatten(), past, seen)
        return self.head(hidden if wanted is None else hidden[wanted]).float()

    def layer_kinds(self) -> list[LayerKind]:
        return [
            *self.decoder_kinds(SelfAttentionLayer, self.language_model.model.rotary),
            (CrossAttentionLayer, "decode", partial(_cross_step, self, 1)),
            (CrossAttentionLayer, "verify", partial(_cross_step, self, DRAFT)),
            (VisionLayer, "vision", partial(_vision, self, False)),
            (GatedVisionLayer, "vision", partial(_vision, self, False)),
            (GatedVisionLayer, "vision", partial(_vision, self, True)),  # as the last layer runs
        ]

    def finish_loading(self, device: torch.device) -> None:
        """Once the weights are there: what is in no checkpoint, and what follows from them."""
        super().finish_loading(device)
        if not self.vision_model.class_embedding.is_meta:
            self.vision_model.finish_loading()
            if not self.vision_model.padding_is_equal:
                self.remarks.append(
                    "the tile tables are not zero where a canvas has no tile, as after training in"
                    " transformers: padding tiles are computed one by one"
                )


def _cross_step(model: MllamaForConditionalGeneration, count: int) -> Example:
    """Of CrossAttentionLayer for `count` tokens that see a picture of one tile."""
    text, like = model.config.text_config, model.like
    tokens = model.config.vision_config.tokens_per_tile
    shape = (1, text.num_key_value_heads, tokens, text.head_dim)
    hidden = like.new_zeros(count, text.hidden_size)
    key, value = (held(like.new_zeros(shape), model.kv_dtype or like.dtype) for _ in range(2))
    seen = SeenSteps(key, value, None, None)
    dynamic = [(seen.key, 2), (seen.value, 2)]
    if count > 1:
        dynamic.append((hidden, 0))
    return Example((hidden, seen), tuple(dynamic))


def _vision(model: MllamaForConditionalGeneration, valid_only: bool) -> Example:
    """Of VisionLayer.forward for a picture of one tile."""
    vision = model.vision_model
    tokens, shares = vision.config.tokens_per_tile, vision.padding_is_equal
    tiles = 1 if shares else vision.config.max_num_tiles
    shape = (1, (tiles + shares) * (tokens + 1), vision.config.hidden_size)
    hidden = model.like.new_zeros(shape)
    args = (hidden, tokens, vision._log_counts(tiles, hidden), valid_only)
    return Example(args, static=((hidden, 0), (hidden, 2)))
