"""Ollama's GGUF files of Mllama: their metadata, their names, and what is done to their values.

There are two forms. Until April 2025 the text is one file and the vision another, whose layers
have names of their own. Since May 2025 one file holds both; the vision's are nearer to the Hub's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.mapped_file import shown
from mmchat.checkpoints.mapping import (
    Rule,
    Shape,
    Transform,
    identity,
    interleaved_to_halves,
    scalar,
)
from mmchat.errors import CheckpointError
from mmchat.models.family import Translated
from mmchat.models.hub_config import levels_of
from mmchat.models.mllama.config import MllamaConfig, TextConfig, parse
from mmchat.models.mllama.tensor_names import GGUF, hf_shapes, other_name
from mmchat.models.mllama.translate import LLAMA3_SCALING
from mmchat.strict_json import Where

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "mllama"
FREQUENCIES = "rope_freqs.weight"  # by which those of RoPE are divided: Llama 3's scaling
BASE_TILES = 448  # px; of the released models, only the 11B base model has such tiles

_TEXT = {  # sections of our params <- keys of the metadata
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "cross_attention_layers": "attention.cross_attention_layers",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
_VISION = {
    "hidden_size": "vision.embedding_length",
    "intermediate_size": "vision.feed_forward_length",
    "num_hidden_layers": "vision.block_count",
    "num_global_layers": "vision.global.block_count",
    "attention_heads": "vision.attention.head_count",
    "num_channels": "vision.num_channels",
    "image_size": "vision.image_size",
    "patch_size": "vision.patch_size",
    "max_num_tiles": "vision.max_num_tiles",
    "intermediate_layers_indices": "vision.intermediate_layers_indices",
    "norm_eps": "vision.attention.layer_norm_epsilon",
}

_SATURATED = 10.0  # a gate whose tanh is 1 in float32
_TOGETHER = 1e-6  # how far tanh and 1 - tanh are from a sum of 1, rounded

_STACKS = {
    "language_model.model": "blk",
    "vision_model.transformer": "v.blk",
    "vision_model.global_transformer": "v.global.blk",
}
# Parts of the vision's layers in a file of their own, where it calls them otherwise.
_TWO_FILES = {
    "attn_output": "attn_out",
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "ffn_up": "ffn_down",  # exchanged
    "ffn_down": "ffn_up",
}
_VISION_LAYER = re.compile(r"(v\.(?:global\.)?blk\.\d+\.)(\w+)(\.weight|\.bias)")
_GLOBAL_GATE = re.compile(r"v\.global\.blk\.\d+\.(attn|ffn)_gate")
_ROTATED = re.compile(r"(language|vision)_model\..*\.(self|cross)_attn\.([qk])_proj\.weight")


def from_gguf(found: Mapping[str, Any], where: Where) -> Translated[MllamaConfig] | None:
    """Translate a file's metadata; None if it is of another architecture. Raises ParamsError."""
    if found.get("general.architecture") != ARCHITECTURE:
        return None

    def section(keys: Mapping[str, str]) -> dict[str, Any]:
        if missing := [k for k in keys.values() if f"{ARCHITECTURE}.{k}" not in found]:
            raise where.child(f"{ARCHITECTURE}.{missing[0]}").fail("missing from the metadata")
        return {ours: _plain(found[f"{ARCHITECTURE}.{key}"]) for ours, key in keys.items()}

    processor = {**levels_of(), "alpha": "checkpoint"}
    text = section(_TEXT) | {"rope_scaling": dict(LLAMA3_SCALING)}
    sections = {"vision_config": section(_VISION), "text_config": text}
    config = parse(sections | {"image_processor": processor}, where)
    dimensions = found.get(f"{ARCHITECTURE}.rope.dimension_count", config.text_config.head_dim)
    if dimensions != config.text_config.head_dim:
        raise where.child(f"{ARCHITECTURE}.rope.dimension_count").fail(
            f"{dimensions}, but a head has {config.text_config.head_dim} dimensions"
        )
    return Translated(config, is_chat=config.vision_config.image_size != BASE_TILES)


def _plain(value: Any) -> Any:
    """As JSON has it: lists, and the shortest number that a float32 is the nearest one to."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return list(value) if isinstance(value, tuple) else value


def gguf_rules(config: MllamaConfig, checkpoint: Checkpoint) -> list[Rule]:
    """From the tensors of `checkpoint` to the Hub's: one rule for each of these.

    Reads the gates of the global layers, a number each, which say how the file was made. Raises
    CheckpointError where the frequencies of RoPE are not those of the config.
    """
    text = config.text_config
    _check_frequencies(text, checkpoint)
    is_pair = "v.blk.0.ln1.weight" in checkpoint.entries
    gates = [name for name in checkpoint.entries if _GLOBAL_GATE.fullmatch(name)]
    # The first files in one, of some days in May 2025, hold these gates as they are: bfloat16
    # numbers, which hyperbolic tangents are not. What else was done later was not done to them.
    squashed = not all(map(_is_bfloat16, map(checkpoint.read, gates)))
    turned = {  # rows of queries and keys; the text's own are rotated, the others need not be so
        ("language", "self"): True,
        ("language", "cross"): squashed or is_pair,
        ("vision", "self"): squashed and not is_pair,
    }
    heads = {"q": text.num_attention_heads, "k": text.num_key_value_heads}

    def transform(target: str, shape: Shape) -> Transform:
        if shape == (1,):
            is_plain = target.startswith("language_model.") or (
                target.startswith("vision_model.global_transformer.") and not squashed
            )
            return scalar if is_plain else _unsquashed
        if (match := _ROTATED.fullmatch(target)) and turned[match[1], match[2]]:
            is_text = match[1] == "language"
            return interleaved_to_halves(
                heads[match[3]] if is_text else config.vision_config.attention_heads
            )
        return identity

    def layer(stack: str, number: int) -> str:
        return f"{_STACKS[stack]}.{number}."

    rules = []
    for target, shape in hf_shapes(config).items():
        name = other_name(target, GGUF, layer)
        if is_pair and (match := _VISION_LAYER.fullmatch(name)):
            name = match[1] + _TWO_FILES.get(match[2], match[2]) + match[3]
        rule = Rule((name,), target, (shape,), transform(target, shape))
        if target == "vision_model.gated_positional_embedding.gate":
            rule = Rule((name, "v.position_embd.gate"), target, (shape, shape), _position_gate)
        rules.append(rule)
    return rules


def _unsquashed(sources: Sequence[Tensor]) -> Tensor:
    """The gate of whose tanh the file holds: the bfloat16 number, unless none has that tanh."""
    import torch

    squashed = scalar(sources).double()
    gate = squashed.atanh().clamp(-_SATURATED, _SATURATED)
    rounded = gate.bfloat16().double()
    fits = (rounded.tanh() - squashed).abs() <= 2 * torch.finfo(torch.float32).eps
    return torch.where(fits, rounded, gate).float()


def _position_gate(sources: Sequence[Tensor]) -> Tensor:
    """The files hold tanh and 1 - tanh of one gate; the second has lost digits."""
    squashed, rest = map(float, map(scalar, ([sources[0]], [sources[1]])))
    if not abs(1 - squashed - rest) <= _TOGETHER:
        raise CheckpointError(
            f"the gates of positions, {squashed:g} and {rest:g}, are not of one model; get the"
            " file again"
        )
    return _unsquashed(sources[:1])


def _is_bfloat16(values: Tensor) -> bool:
    import torch

    return bool((values.float().view(torch.int32) & 0xFFFF == 0).all())


def _check_frequencies(c: TextConfig, checkpoint: Checkpoint) -> None:
    """Whether RoPE is scaled as the config says, which the file says by a tensor."""
    import torch

    from mmchat.nn.rope import inverse_frequencies, scale_llama3

    entry = checkpoint.entries.get(FREQUENCIES)
    half, scaling = c.head_dim // 2, c.rope_scaling
    if entry is None or entry.shape != (half,):
        raise CheckpointError(
            f"{shown(checkpoint.files[0])}: expected {FREQUENCIES} of {half} numbers, found"
            f" {'none' if entry is None else list(entry.shape)}"
        )
    plain = inverse_frequencies(c.head_dim, c.rope_theta)
    scaled = scale_llama3(plain, **vars(scaling)) if scaling else plain
    found = checkpoint.read(FREQUENCIES).float()
    if not torch.allclose(found * scaled, plain, rtol=1e-3, atol=0):
        raise CheckpointError(
            f"{shown(checkpoint.files[0])}: its {FREQUENCIES} scale RoPE otherwise than Llama 3.2;"
            " is it another model?"
        )
