"""Checkpoints in Meta's format, made of weights under the Hub's names: the way back of a reader.

Meta's files are what `torch.save` writes. The layouts are undone here, by other code than that
which makes them; what Meta's format cannot hold is an AssertionError.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmchat.catalog.spec import ModelSpec, load_spec, params_document
from mmchat.checkpoints.mapping import Rule
from mmchat.errors import ParamsError
from mmchat.models.mllama.config import EXTRA_EMBEDDING_ROWS, MllamaConfig
from mmchat.models.mllama.meta_format import meta_rules
from tests.models.mllama.oracle import random_weights

EMBEDDING = "language_model.model.embed_tokens.weight"
PATCHES = "vision_model.patch_embedding.weight"
ROTATED = re.compile(r"language_model\.model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")
TILE_TABLE = re.compile(r"vision_model\..*\.(tile_embedding|embedding)\.weight")


def weights_for(config: MllamaConfig) -> dict[str, Tensor]:
    """Random weights by the Hub's names, whose tables of tile positions Meta's format can hold."""
    weights = random_weights(config)
    for rule in meta_rules(config):
        if TILE_TABLE.fullmatch(rule.target):
            weights[rule.target] = rule.transform([torch.randn(rule.shapes[0])])
    return weights


def meta_tensors(weights: dict[str, Tensor], config: MllamaConfig) -> dict[str, Tensor]:
    """Meta's names and layouts of weights by the Hub's names."""
    found: dict[str, Tensor] = {}
    for rule in meta_rules(config):
        parts = _undone(rule, weights[rule.target], config)
        found |= {n: part.clone() for n, part in zip(rule.sources, parts, strict=True)}
    return found


def _undone(rule: Rule, target: Tensor, config: MllamaConfig) -> list[Tensor]:
    text = config.text_config
    if rule.target == EMBEDDING:
        return list(target.split([text.vocab_size, EXTRA_EMBEDDING_ROWS]))
    if rule.target == PATCHES:
        return [target.flatten(1)]
    if rotated := ROTATED.fullmatch(rule.target):
        heads = text.num_attention_heads if rotated[1] == "q" else text.num_key_value_heads
        rows = target.reshape(heads, 2, -1, target.shape[1])  # halves of a head, their rows
        return [torch.stack((rows[:, 0], rows[:, 1]), dim=2).reshape(target.shape)]
    if TILE_TABLE.fullmatch(rule.target):
        return [_tile_table(target, rule.shapes[0], config.vision_config.aspect_ratios)]
    return [target]


def _tile_table(target: Tensor, shape: Any, ratios: Any) -> Tensor:
    """A table by tile row and column of one by canvas; cells that no canvas reaches are zero."""
    tiles, _, tokens, width = shape
    canvases = target.reshape(len(ratios) + 1, tiles, tokens, width)
    table = target.new_zeros(shape)
    for row, (height, across) in enumerate(ratios, start=1):
        table[:height, :across] = canvases[row, : height * across].reshape(
            height, across, tokens, width
        )
    assert not canvases[0].any(), "values for no picture"
    for row, (height, across) in enumerate(ratios, start=1):
        used = table[:height, :across].reshape(height * across, tokens, width)
        assert torch.equal(canvases[row, : height * across], used), "differs between canvases"
        assert not canvases[row, height * across :].any(), "values where a canvas has no tile"
    return table


def split_as_meta_does(weights: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Shards by the kind of layer: row-parallel, column-parallel or whole. Not by our own rules."""
    by_rows = ("tok_embeddings", "learnable_embedding", "output", "wq", "wk", "wv", "w1", "w3",
               "c_fc", "conv1._linear", "vision_projection")  # fmt: skip
    by_columns = ("wo.weight", "w2.weight", "c_proj.weight")
    ranks: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in weights.items():
        owner = name.rsplit(".", 1)[0]
        if owner.endswith(by_rows):
            pieces = tensor.chunk(count, 0)
        elif name.endswith(by_columns):
            pieces = tensor.chunk(count, 1)
        else:
            pieces = [tensor] * count
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece.clone()
    return ranks


def meta_params(config: MllamaConfig) -> dict[str, Any]:
    """Meta's params.json, which has no word for the vision tower's sizes."""
    text, vision = config.text_config, config.vision_config
    cross = len(text.cross_attention_layers)
    multiplier, multiple = _feed_forward(text.hidden_size, text.intermediate_size)
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers - cross,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "vision_chunk_size": vision.image_size,
        "vision_max_num_chunks": vision.max_num_tiles,
        "vision_num_cross_attention_layers": cross,
    }


def _feed_forward(width: int, inner: int) -> tuple[float, int]:
    """ffn_dim_multiplier and multiple_of that give `inner`; Meta's own where they do."""
    base = int(2 * (4 * width) / 3)
    for multiplier, multiple in ((1.3, 1024), (1.3, 4096), (1.0, 256)):
        if multiple * -(-int(multiplier * base) // multiple) == inner:
            return multiplier, multiple
    return (inner + 0.5) / base, 1


def write_meta_folder(
    folder: Path,
    spec: ModelSpec,
    weights: dict[str, Tensor],
    tokenizer: Path,
    *,
    shards: int = 1,
) -> Path:
    """A folder as Meta hands it out, of weights by the Hub's names: shards, checklist, tokenizer.

    params.json is in mmchat's own form where Meta's cannot say what the model is.
    """
    folder.mkdir(parents=True)
    tensors = meta_tensors(weights, spec.config)
    for number, rank in enumerate(split_as_meta_does(tensors, shards)):
        torch.save(rank, folder / f"consolidated.{number:02d}.pth")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    place = folder / "params.json"
    place.write_text(json.dumps(meta_params(spec.config)))
    if not _says(place, spec):
        place.write_text(json.dumps(params_document(spec)))
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in folder.iterdir()]
    (folder / "checklist.chk").write_text("".join(sums))
    return folder


def _says(place: Path, spec: ModelSpec) -> bool:
    try:
        found = load_spec(place)
    except ParamsError:
        return False
    return (found.config, found.chat_format) == (spec.config, spec.chat_format)
