"""Meta's consolidated.pth: its names, its layouts, its shards, and the way to the Hub's names.

A linear layer is [out, in] in both. Shapes and names are those of Meta's reference implementation.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

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
from mmchat.models.mllama.config import EXTRA_EMBEDDING_ROWS, MllamaConfig
from mmchat.models.mllama.tensor_names import ENCODER, META, hf_shapes, other_name

if TYPE_CHECKING:
    from torch import Tensor

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
