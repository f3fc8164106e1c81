"""Meta's params.json and consolidated.pth: sizes, names, layouts, shards, and the way to the Hub's.

A linear layer is [out, in] in both. Shapes and names are those of Meta's reference implementation.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from mmchat.checkpoints.mapping import (
    Rule,
    Shape,
    Transform,
    concatenate,
    identity,
    interleaved_to_halves,
    reshape,
    scalar,
)
from mmchat.models.family import Translated
from mmchat.models.hub_config import levels_of
from mmchat.models.mllama.config import EXTRA_EMBEDDING_ROWS, MllamaConfig, parse
from mmchat.models.mllama.tensor_names import ENCODER, META, hf_shapes, other_name
from mmchat.models.mllama.translate import HF_VISION, LLAMA3_SCALING, ROPE_THETA
from mmchat.strict_json import Where, parse_dataclass

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Params:
    """What params.json says of a model; other keys do not matter here."""

    dim: int
    n_layers: int  # of self-attention
    n_heads: int
    vocab_size: int
    vision_chunk_size: int
    vision_num_cross_attention_layers: int
    n_kv_heads: int | None = None
    vision_max_num_chunks: int = 4
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = ROPE_THETA
    use_scaled_rope: bool = False


# Before anything is computed of them; what is not here is checked with the config.
_BOUNDS = {
    _Params: {
        "dim": (8, 32_768),
        "n_layers": (1, 255),
        "vision_num_cross_attention_layers": (1, 255),
        "vision_max_num_chunks": (1, 16),
        "multiple_of": (1, 131_072),
        "ffn_dim_multiplier": (0.1, 16.0),
    }
}


def from_makers(
    found: Mapping[str, Any], folders: str, where: Where
) -> Translated[MllamaConfig] | None:
    """Translate Meta's params.json, which does not say whether the model chats; None for others."""
    if isinstance(nested := found.get("model"), dict) and "dim" in nested:
        found, where = nested, where.child("model")
    if "dim" not in found:
        return None
    config = from_meta_params(found, where)
    if "instruct" in folders or "guard" in folders:
        return Translated(config, is_chat=True)
    # Of the released models, only the 11B base model has tiles of 448 pixels.
    is_base = re.search(r"\d+b-vision", folders) or config.vision_config.image_size == 448
    return Translated(config, is_chat=False if is_base else None)


def from_meta_params(found: Mapping[str, Any], where: Where) -> MllamaConfig:
    """Translate the numbers of Meta's; the vision tower's sizes are fixed in Meta's code."""
    if found.get("vision_chunk_size") is None:
        raise where.child("vision_chunk_size").fail(
            "missing; these are not the params of a vision model"
        )
    given = {f.name: found[f.name] for f in fields(_Params) if found.get(f.name) is not None}
    nested = found.get("vision_model")
    if isinstance(nested, dict) and isinstance(nested.get("cross_attention_adapter"), dict):
        layers = nested["cross_attention_adapter"].get("num_layers")  # an older form
        given = {"vision_num_cross_attention_layers": layers, **given}
    meta = parse_dataclass(_Params, given, where, _BOUNDS)
    cross = _cross_layers(meta.n_layers, meta.vision_num_cross_attention_layers, where)
    # 2/3 of 4 dim, times the multiplier, up to the next multiple (llama_models)
    wide = int(meta.ffn_dim_multiplier * int(2 * (4 * meta.dim) / 3))
    text = {
        "vocab_size": meta.vocab_size,
        "hidden_size": meta.dim,
        "intermediate_size": meta.multiple_of * math.ceil(wide / meta.multiple_of),
        "num_hidden_layers": meta.n_layers + len(cross),
        "num_attention_heads": meta.n_heads,
        "num_key_value_heads": meta.n_kv_heads or meta.n_heads,
        "cross_attention_layers": cross,
        "rms_norm_eps": meta.norm_eps,
        "rope_theta": meta.rope_theta,
        "rope_scaling": dict(LLAMA3_SCALING) if meta.use_scaled_rope else None,
        "max_position_embeddings": 131_072,
    }
    sizes = {"image_size": meta.vision_chunk_size, "max_num_tiles": meta.vision_max_num_chunks}
    processor = {**levels_of(), "alpha": "checkpoint"}
    sections = {"vision_config": HF_VISION | sizes, "text_config": text}
    return parse(sections | {"image_processor": processor}, where)


def _cross_layers(self_layers: int, count: int, where: Where) -> list[int]:
    """Indices of the cross-attention layers among all layers, as the Hub's config lists them.

    Meta counts self-attention layers only and puts a cross-attention layer before every k-th of
    them, chosen from the last layer downwards (llama_models, CrossAttentionTransformerText).
    """
    step = math.ceil(self_layers / count)
    before = sorted(range(self_layers - 1, -1, -step)[:count])
    if len(before) < count:
        raise where.fail(f"{count} cross-attention layers do not fit among {self_layers} layers")
    return [layer + earlier for earlier, layer in enumerate(before)]


_SHARDED_ROWS = re.compile(
    r".*\b(tok_embeddings|learnable_embedding|output|w[qkv13]|_linear|c_fc|vision_projection)"
    r"\.(weight|bias)"
)
_SHARDED_COLUMNS = re.compile(r".*\.(wo|w2|c_proj)\.weight")


def shard_dims(name: str) -> Literal[0, 1] | None:
    """The axis along which Meta's shards of a tensor are joined; None: each holds all of it."""
    if _SHARDED_ROWS.fullmatch(name):
        return 0
    return 1 if _SHARDED_COLUMNS.fullmatch(name) else None


_EMBEDDING = "language_model.model.embed_tokens.weight"
_PATCHES = "vision_model.patch_embedding.weight"
# Tables of tiles -> tokens of each tile that they have a row for; None: all.
_TILE_TABLES = (
    ("vision_model.gated_positional_embedding.tile_embedding.weight", None),
    ("vision_model.pre_tile_positional_embedding.embedding.weight", 1),
    ("vision_model.post_tile_positional_embedding.embedding.weight", 1),
)


def meta_rules(config: MllamaConfig) -> list[Rule]:
    """From Meta's tensors (sources) to the Hub's (targets): one rule for each target."""
    text, vision = config.text_config, config.vision_config
    places = {  # Meta counts layers of self- and cross-attention by themselves
        layer: f"text_model.{kind}.{place}."
        for kind, layers in (
            ("layers", text.self_attention_layers),
            ("cross_attention_layers", text.cross_attention_layers),
        )
        for place, layer in enumerate(layers)
    }

    def layer(stack: str, number: int) -> str:
        if stack == "language_model.model":
            return places[number]
        return f"{ENCODER}{stack.removeprefix('vision_model.')}.resblocks.{number}."

    ours = hf_shapes(config)
    width, patches = text.hidden_size, ours[_PATCHES]
    parts = (text.vocab_size, width), (EXTRA_EMBEDDING_ROWS, width)
    special: dict[str, tuple[tuple[Shape, ...], Transform]] = {
        _EMBEDDING: (parts, concatenate),
        _PATCHES: (((patches[0], math.prod(patches[1:])),), reshape(patches)),
    }
    for name, tokens in _TILE_TABLES:
        count = tokens or vision.tokens_per_tile
        table = (vision.max_num_tiles, vision.max_num_tiles, count, vision.hidden_size)
        special[name] = ((table,), _expand_tiles(vision.aspect_ratios, table))
    heads = (("q", text.num_attention_heads), ("k", text.num_key_value_heads))
    for i, (kind, count) in itertools.product(text.self_attention_layers, heads):
        name = f"language_model.model.layers.{i}.self_attn.{kind}_proj.weight"
        special[name] = ((ours[name],), interleaved_to_halves(count))
    rules = []
    for target, shape in ours.items():
        sources = [other_name(target, META, layer)]
        if target == _EMBEDDING:
            sources.append("text_model.learnable_embedding.weight")
        usual = (shape,), scalar if shape == (1,) else identity
        rules.append(Rule(tuple(sources), target, *special.get(target, usual)))
    return rules


def _expand_tiles(ratios: Sequence[tuple[int, int]], shape: Shape) -> Transform:
    """A table by tile row and column, [T, T, P, C], to one by canvas, [1 + canvases, T·P·C].

    Row i + 1 holds the tiles of canvas i, row by row, and zeros; row 0, of no picture, is zero.
    Cells of the first table that no canvas reaches are lost.
    """
    tiles, _, tokens, width = shape

    def transform(sources: Sequence[Tensor]) -> Tensor:
        table = sources[0]
        target = table.new_zeros(len(ratios) + 1, tiles, tokens * width)
        for row, (h, w) in enumerate(ratios, start=1):
            target[row, : h * w] = table[:h, :w].reshape(h * w, -1)
        return target.flatten(1)

    return transform
