"""An Mllama of true widths and reduced depth with random weights: what speed is measured on.

Weights are N(0, 0.02), norms 1 and gates 0.1 to 0.5, so that every branch counts in the logits.
"""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmchat.catalog.spec import ModelSpec
from mmchat.errors import UsageError
from mmchat.models.base import Batch
from mmchat.models.mllama.cache import MllamaCache
from mmchat.models.mllama.config import MllamaConfig, TextConfig, VisionConfig
from mmchat.models.mllama.text import KeyValue
from mmchat.models.row_cache import Place
from mmchat.nn.attention import held

_CHUNK = 2**24  # numbers drawn from one seed, so that threads do not change the result
_TABLES = ("tile_embedding.weight", "tile_positional_embedding.embedding.weight")


def config_of(spec: ModelSpec) -> MllamaConfig:
    """The config of an Mllama. Raises UsageError for another family."""
    if not isinstance(spec.config, MllamaConfig):
        raise UsageError(f"the benchmarks are of Mllama, and {spec.name} is none; name another")
    return spec.config


def with_depth(config: MllamaConfig, layers: int, vision_layers: int) -> MllamaConfig:
    """The same widths with fewer layers; every 5th vision layer, at least one, is a global one.

    The number of intermediate vision states stays, so the projector keeps its shape; with few
    layers the same one is taken several times. Raises ValueError below 2 layers or 3 of vision.
    """
    return replace(
        config,
        vision_config=_vision_with_depth(config.vision_config, vision_layers),
        text_config=_text_with_depth(config.text_config, layers),
    )


def depth(config: MllamaConfig) -> tuple[int, int]:
    """(text layers, vision layers), cross-attention and global ones included."""
    vision = config.vision_config
    return config.text_config.num_hidden_layers, (
        vision.num_hidden_layers + vision.num_global_layers
    )


def _text_with_depth(config: TextConfig, layers: int) -> TextConfig:
    if not 2 <= layers <= config.num_hidden_layers:
        raise ValueError(f"text layers must be 2 to {config.num_hidden_layers}, not {layers}")
    cross = tuple(i for i in config.cross_attention_layers if i < layers) or (layers - 1,)
    return replace(config, num_hidden_layers=layers, cross_attention_layers=cross)


def _vision_with_depth(config: VisionConfig, layers: int) -> VisionConfig:
    full = config.num_hidden_layers + config.num_global_layers
    if not 3 <= layers <= full:
        raise ValueError(f"vision layers must be 3 to {full}, not {layers}")
    num_global = max(1, layers * config.num_global_layers // full)
    local = layers - num_global
    indices = tuple(
        min(max(1, i * local // config.num_hidden_layers), local - 1)
        for i in config.intermediate_layers_indices
    )
    return replace(
        config,
        num_hidden_layers=local,
        num_global_layers=num_global,
        intermediate_layers_indices=indices,
    )


def random_tensor(
    config: MllamaConfig,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The tensor with this Hub name; it depends on the name and the seed alone, per device type."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    key = f"{seed} {name}"
    if "gate" in name.rsplit(".", 1)[-1]:
        generator = torch.Generator(device).manual_seed(_hash(key))
        uniform = torch.rand(shape, generator=generator, device=device)
        return (0.1 + 0.4 * uniform).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=device)
    _fill_normal(out.view(-1), key)
    if name.endswith(_TABLES):
        _clear_unused_slots(out, config.vision_config)
    return out


def _hash(key: str) -> int:
    """32 bits: more are not read from a seed on the CPU."""
    return zlib.crc32(key.encode())


def _fill_normal(out: Tensor, key: str) -> None:
    def fill(index: int) -> None:
        chunk = out[index * _CHUNK : (index + 1) * _CHUNK]
        generator = torch.Generator(out.device).manual_seed(_hash(f"{key} {index}"))
        chunk.normal_(0, 0.02, generator=generator)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(-(-out.numel() // _CHUNK))))


def _clear_unused_slots(table: Tensor, config: VisionConfig) -> None:
    """As in every checkpoint, a canvas has no embedding for tiles that it does not have."""
    slots = table.view(len(config.aspect_ratios) + 1, config.max_num_tiles, -1)
    slots[0] = 0
    for row, (tiles_h, tiles_w) in enumerate(config.aspect_ratios, start=1):
        slots[row, tiles_h * tiles_w :] = 0


@dataclass(frozen=True)
class RandomContext:
    """Keys and values as if `length` positions had been read, a picture at 0 among them or none.

    text: for each self-attention layer keys and values [1, G, L, D]. image: for each
    cross-attention layer [1, G, M, D], or None.
    """

    length: int
    text: tuple[KeyValue, ...]
    image: tuple[KeyValue, ...] | None


def random_context(
    config: MllamaConfig,
    length: int,
    tiles: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> RandomContext:
    """A long conversation without reading it, to measure what decoding after it costs."""
    text = config.text_config
    generator = torch.Generator(device).manual_seed(seed)

    def pair(*shape: int) -> KeyValue:
        key, value = torch.randn(2, *shape, generator=generator, device=device).to(dtype)
        return key, value

    heads, size = text.num_key_value_heads, text.head_dim
    seen = tiles * config.vision_config.tokens_per_tile
    layers = tuple(pair(1, heads, length, size) for _ in text.self_attention_layers)
    image = tuple(pair(1, heads, seen, size) for _ in text.cross_attention_layers)
    return RandomContext(length, layers, image if tiles else None)


@torch.inference_mode()
def fill_cache(cache: MllamaCache, context: RandomContext) -> None:
    """Put the context into all rows of an empty cache, as encoding and reading would."""
    if context.image is not None:
        cache.keep_media("random picture", [(k.clone(), v.clone()) for k, v in context.image])
    for slot in range(len(cache.lengths)):
        cache.reserve(slot, context.length)
        for layer, pair in zip(cache.layers, context.text, strict=True):
            for stored, tensor in zip(layer.row(slot), pair, strict=True):
                stored[:, :, : context.length] = held(tensor, stored.dtype)
        if context.image is not None:
            cache.places[slot] = (Place(0, 1, "random picture"),)
        cache.advance(Batch.last_of(torch.zeros(context.length), 0, slot))
