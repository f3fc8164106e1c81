"""How many bytes one decoded token must read: what its time is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from benchmarks.random_mllama import config_of
from mmchat.models.mllama.config import TextConfig
from mmchat.models.mllama.footprint import footprint

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel


def decode_bytes(loaded: LoadedModel, context: int, tiles: int) -> int:
    """Weights as they lie in memory, keys and values; the one row of the embedding is left out."""
    tensors = weights_of(loaded)
    config = config_of(loaded.spec)
    read = _read(tensors, config.text_config, bool(tiles))
    weights = sum(t.numel() * t.element_size() for t in read)
    sizes = footprint(config)
    cached = context * sizes.cache_per_token + tiles * sizes.cache_per_tile
    return weights + cached * loaded.dtype.itemsize


def weights_of(loaded: LoadedModel) -> Mapping[str, Tensor]:
    """The tensors that the model reads, by name; none of a runtime that does not show them."""
    model: Any = getattr(loaded.runtime, "model", None)
    if isinstance(model, nn.Module):
        return dict(chain(model.named_parameters(), model.named_buffers()))
    return getattr(model, "weights", {})


def _read(tensors: Mapping[str, Tensor], text: TextConfig, with_picture: bool) -> Iterator[Tensor]:
    """The tensors of the decoder; keys and values of pictures are projected once, not per token."""
    unread = [".cross_attn.k_proj.", ".cross_attn.v_proj.", ".embed_tokens.", ".rotary."]
    if not with_picture:
        unread += [f".layers.{index}." for index in text.cross_attention_layers]
    for name, tensor in tensors.items():
        if name.startswith("language_model.") and not any(part in name for part in unread):
            yield tensor
