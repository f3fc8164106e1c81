"""Ollama's GGUF files of Mllama: their metadata, their names, and what is done to their values.

There are two forms. Until April 2025 the text is one file and the vision another, whose layers
have names of their own. Since May 2025 one file holds both; the vision's are nearer to the Hub's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.mapped_file import shown
from mmchat.checkpoints.mapping import (
    Rule,
    Shape,
    Transform,
    expand,
    identity,
    interleaved_to_halves,
    scalar,
)
from mmchat.errors import CheckpointError
from mmchat.models.family import Translated
from mmchat.models.hub_config import CLIP_MEAN, CLIP_STD
from mmchat.models.mllama.config import MllamaConfig, TextConfig, VisionConfig
from mmchat.models.mllama.params import parse
from mmchat.models.mllama.tensor_names import hf_shapes
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

# Parts of a layer: GGUF's name -> the Hub's.
_TEXT_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_SELF = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_CROSS = {f"cross_attn_{p}_proj.weight": f"cross_attn.{p}_proj.weight" for p in "qkvo"} | {
    "cross_attn_q_norm.weight": "cross_attn.q_norm.weight",
    "cross_attn_k_norm.weight": "cross_attn.k_norm.weight",
    "cross_attn_attn_gate": "cross_attn_attn_gate",
    "cross_attn_mlp_gate": "cross_attn_mlp_gate",
}
_VISION_LAYER = {f"attn_{p}": f"self_attn.{p}_proj" for p in "qkv"}
_ONE_FILE = _VISION_LAYER | {
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_TWO_FILES = _VISION_LAYER | {
    "attn_out": "self_attn.o_proj",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "ffn_down": "mlp.fc1",  # exchanged
    "ffn_up": "mlp.fc2",
}
_BOTH = ("weight", "bias")
_GLOBAL_GATES = {"attn_gate": "gate_attn", "ffn_gate": "gate_ffn"}


def from_gguf(found: Mapping[str, Any], where: Where) -> Translated[MllamaConfig] | None:
    """Translate a file's metadata; None if it is of another architecture. Raises ParamsError."""
    if found.get("general.architecture") != ARCHITECTURE:
        return None

    def section(keys: Mapping[str, str]) -> dict[str, Any]:
        if missing := [k for k in keys.values() if f"{ARCHITECTURE}.{k}" not in found]:
            raise where.child(f"{ARCHITECTURE}.{missing[0]}").fail("missing from the metadata")
        return {ours: _plain(found[f"{ARCHITECTURE}.{key}"]) for ours, key in keys.items()}

    processor = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "alpha": "checkpoint"}
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


def gguf_shapes(config: MllamaConfig, rules: Sequence[Rule]) -> dict[str, Shape]:
    """Name -> shape of every tensor that `rules` read."""
    ours = hf_shapes(config)
    return {name: ours[rule.target] for rule in rules for name in rule.sources}


def gguf_rules(config: MllamaConfig, checkpoint: Checkpoint) -> list[Rule]:
    """From the tensors of `checkpoint` to the Hub's: one rule for each of these.

    Reads the gates of the global layers, a number each, which say how the file was made. Raises
    CheckpointError where the frequencies of RoPE are not those of the config.
    """
    _check_frequencies(config.text_config, checkpoint)
    is_pair = "v.blk.0.ln1.weight" in checkpoint.entries
    gates = [name for name in checkpoint.entries if name.startswith("v.global.blk.")]
    gates = [name for name in gates if name.endswith(tuple(_GLOBAL_GATES))]
    # The first files in one, of some days in May 2025, hold these gates as they are: bfloat16
    # numbers, which hyperbolic tangents are not. What else was done later was not done to them.
    squashed = not all(map(_is_bfloat16, map(checkpoint.read, gates)))
    text = _text_rules(config.text_config, cross_interleaved=squashed or is_pair)
    vision = _vision_rules(
        config.vision_config,
        _TWO_FILES if is_pair else _ONE_FILE,
        squashed=squashed,
        interleaved=squashed and not is_pair,
    )
    return expand([*text, *vision])


def _text_rules(c: TextConfig, *, cross_interleaved: bool) -> Iterator[Rule]:
    heads, groups = map(interleaved_to_halves, (c.num_attention_heads, c.num_key_value_heads))
    yield Rule(("token_embd.weight",), "language_model.model.embed_tokens.weight")
    yield Rule(("output_norm.weight",), "language_model.model.norm.weight")
    yield Rule(("output.weight",), "language_model.lm_head.weight")
    turned = {"attn_q.weight": heads, "attn_k.weight": groups}
    if cross_interleaved:  # though these are not rotated
        turned |= {"cross_attn_q_proj.weight": heads, "cross_attn_k_proj.weight": groups}
    for layers, names in (
        (c.self_attention_layers, _TEXT_LAYER | _SELF),
        (c.cross_attention_layers, _TEXT_LAYER | _CROSS),
    ):
        for theirs, ours in names.items():
            yield _layer_rule(
                f"blk.{{}}.{theirs}",
                f"language_model.model.layers.{{}}.{ours}",
                layers,
                turned.get(theirs, scalar if theirs.endswith("gate") else identity),
            )


def _layer_rule(
    source: str, target: str, layers: Sequence[int], transform: Transform = identity
) -> Rule:
    return Rule((source,), target, transform, [(layer, layer) for layer in layers])


def _vision_rules(
    c: VisionConfig, names: Mapping[str, str], *, squashed: bool, interleaved: bool
) -> Iterator[Rule]:
    """names: the parts of a layer. squashed: the global gates hold tanh; interleaved: the rows of
    queries and keys do, of which attention does not depend."""
    ours = "vision_model."
    yield Rule(("v.class_embd",), f"{ours}class_embedding")
    yield Rule(("v.patch_embd.weight",), f"{ours}patch_embedding.weight")
    positions = f"{ours}gated_positional_embedding."
    yield Rule(("v.position_embd.weight",), f"{positions}embedding")
    yield Rule(("v.tile_position_embd.weight",), f"{positions}tile_embedding.weight")
    gates = ("v.tile_position_embd.gate", "v.position_embd.gate")
    yield Rule(gates, f"{positions}gate", _position_gate)
    for place in ("pre", "post"):
        table = f"{ours}{place}_tile_positional_embedding."
        yield Rule((f"v.{place}_tile_position_embd.weight",), f"{table}embedding.weight")
        yield Rule((f"v.{place}_tile_position_embd.gate",), f"{table}gate", _unsquashed)
        for kind in ("weight", "bias"):
            yield Rule((f"v.{place}_ln.{kind}",), f"{ours}layernorm_{place}.{kind}")
    turned = interleaved_to_halves(c.attention_heads) if interleaved else identity
    for theirs, target, count in (
        ("v.blk", f"{ours}transformer.layers", c.num_hidden_layers),
        ("v.global.blk", f"{ours}global_transformer.layers", c.num_global_layers),
    ):
        for name, part in names.items():
            for kind in ("weight",) if name.startswith("attn_") and "norm" not in name else _BOTH:
                transform = turned if name in ("attn_q", "attn_k") else identity
                source, goal = f"{theirs}.{{}}.{name}.{kind}", f"{target}.{{}}.{part}.{kind}"
                yield _layer_rule(source, goal, range(count), transform)
    for theirs, part in _GLOBAL_GATES.items():
        source, goal = f"v.global.blk.{{}}.{theirs}", f"{ours}global_transformer.layers.{{}}.{part}"
        transform = _unsquashed if squashed else scalar
        yield _layer_rule(source, goal, range(c.num_global_layers), transform)
    for kind in _BOTH:
        yield Rule((f"mm.0.{kind}",), f"multi_modal_projector.{kind}")


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
    scaled = scale_llama3(plain, *vars(scaling).values()) if scaling else plain
    found = checkpoint.read(FREQUENCIES).float()
    if not torch.allclose(found * scaled, plain, rtol=1e-3, atol=0):
        raise CheckpointError(
            f"{shown(checkpoint.files[0])}: its {FREQUENCIES} scale RoPE otherwise than Llama 3.2;"
            " is it another model?"
        )
