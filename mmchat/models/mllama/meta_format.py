"""Meta's consolidated.pth: its names, its layouts, its shards, and the way to the Hub's names.

A linear layer is [out, in] in both. Shapes and names are those of Meta's reference implementation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from mmchat.checkpoints.mapping import (
    Rule,
    Shape,
    Transform,
    concatenate,
    expand,
    identity,
    interleaved_to_halves,
    reshape,
    scalar,
)
from mmchat.models.mllama.config import EXTRA_EMBEDDING_ROWS, MllamaConfig, TextConfig, VisionConfig
from mmchat.models.mllama.tensor_names import hf_shapes

if TYPE_CHECKING:
    from torch import Tensor

_ENCODER = "vision_model.vision_encoder."

# Parts of a layer: Meta's name -> the Hub's.
_TEXT_LAYER = {
    **{f"attention.w{p}.weight": f"{{attention}}.{p}_proj.weight" for p in "qkvo"},
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
_CROSS_ONLY = {
    "attention.q_norm.weight": "cross_attn.q_norm.weight",
    "attention.k_norm.weight": "cross_attn.k_norm.weight",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
}
_VISION_LAYER = {
    **{f"attn.w{p}.weight": f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
            ("ln_1", "input_layernorm"),
            ("ln_2", "post_attention_layernorm"),
        )
        for kind in ("weight", "bias")
    },
}
_GLOBAL_ONLY = {"gate_attn": "gate_attn", "gate_ffn": "gate_ffn"}
_GATES = frozenset({"gate_attn", "gate_ffwd", "gate_ffn"})

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


def meta_shapes(config: MllamaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of Meta's checkpoint, its shards joined."""
    ours = hf_shapes(config)
    return {
        name: shape
        for rule in meta_rules(config)
        for name, shape in zip(
            rule.sources, rule.source_shapes or (ours[rule.target],), strict=True
        )
    }


def meta_rules(config: MllamaConfig) -> list[Rule]:
    """From Meta's tensors (sources) to the Hub's (targets): one rule for each target."""
    return expand([*_text_rules(config.text_config), *_vision_rules(config.vision_config)])


def _text_rules(c: TextConfig) -> Iterator[Rule]:
    width, rows = c.hidden_size, (c.vocab_size, EXTRA_EMBEDDING_ROWS)
    yield Rule(
        ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight"),
        "language_model.model.embed_tokens.weight",
        concatenate,
        source_shapes=tuple((length, width) for length in rows),
    )
    rotary = {
        "attention.wq.weight": interleaved_to_halves(c.num_attention_heads),
        "attention.wk.weight": interleaved_to_halves(c.num_key_value_heads),
    }
    ours = "language_model.model.layers."
    for name, target in _TEXT_LAYER.items():
        yield _layer_rule(
            ("text_model.layers.", name),
            (ours, target.format(attention="self_attn")),
            c.self_attention_layers,
            rotary.get(name),
        )
    for name, target in (_TEXT_LAYER | _CROSS_ONLY).items():
        yield _layer_rule(
            ("text_model.cross_attention_layers.", name),
            (ours, target.format(attention="cross_attn")),
            c.cross_attention_layers,
        )
    yield Rule(("text_model.norm.weight",), "language_model.model.norm.weight")
    yield Rule(("text_model.output.weight",), "language_model.lm_head.weight")


def _layer_rule(
    source: tuple[str, str],
    target: tuple[str, str],
    layers: Sequence[int],
    transform: Transform | None = None,
) -> Rule:
    """A rule for one part of layers that Meta counts from 0 and that stand at `layers` here."""
    if transform is None:
        transform = scalar if source[1] in _GATES else identity
    names = "{}.".join(source), "{}.".join(target)
    return Rule((names[0],), names[1], transform, tuple(enumerate(layers)))


def _vision_rules(c: VisionConfig) -> Iterator[Rule]:
    patch = (c.num_channels, c.patch_size, c.patch_size)
    flat = (c.hidden_size, c.num_channels * c.patch_size**2)
    yield Rule(
        (f"{_ENCODER}conv1._linear.weight",),
        "vision_model.patch_embedding.weight",
        reshape((c.hidden_size, *patch)),
        source_shapes=(flat,),
    )
    yield Rule((f"{_ENCODER}class_embedding",), "vision_model.class_embedding")
    yield from _position_rules(c)
    for place in ("pre", "post"):
        for kind in ("weight", "bias"):
            yield Rule((f"{_ENCODER}ln_{place}.{kind}",), f"vision_model.layernorm_{place}.{kind}")
    for stack, count, names in (
        ("transformer", c.num_hidden_layers, _VISION_LAYER),
        ("global_transformer", c.num_global_layers, _VISION_LAYER | _GLOBAL_ONLY),
    ):
        for theirs, ours in names.items():
            yield _layer_rule(
                (f"{_ENCODER}{stack}.resblocks.", theirs),
                (f"vision_model.{stack}.layers.", ours),
                range(count),
            )
    for kind in ("weight", "bias"):
        yield Rule((f"vision_model.vision_projection.{kind}",), f"multi_modal_projector.{kind}")


def _position_rules(c: VisionConfig) -> Iterator[Rule]:
    """Positions of patches in a tile and of tiles on the canvas, with their gates."""
    ours = "vision_model.gated_positional_embedding."
    yield Rule((f"{_ENCODER}positional_embedding",), f"{ours}embedding")
    yield Rule((f"{_ENCODER}gated_positional_embedding_gate",), f"{ours}gate", scalar)
    tables = {
        "gated_positional_embedding": (f"{ours}tile_embedding.weight", c.tokens_per_tile),
    }
    for place in ("pre", "post"):
        theirs, ours = f"{place}_tile_pos_embed", f"vision_model.{place}_tile_positional_embedding"
        yield Rule((f"{_ENCODER}{theirs}.gate",), f"{ours}.gate", scalar)
        tables[f"{theirs}.embedding"] = (f"{ours}.embedding.weight", 1)
    for name, (target, tokens) in tables.items():
        shape = (c.max_num_tiles, c.max_num_tiles, tokens, c.hidden_size)
        transform = _expand_tiles(c.aspect_ratios, shape)
        yield Rule((_ENCODER + name,), target, transform, source_shapes=(shape,))


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
