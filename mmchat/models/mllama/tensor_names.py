"""Names and shapes of Mllama's tensors on the Hub, and what other writers call them."""

from __future__ import annotations

import re
from collections.abc import Callable

from mmchat.models.mllama.config import MllamaConfig, TextConfig, VisionConfig
from mmchat.models.sizes import Shape, biased, decoder_layer, numbered

_OF_TEXT = ("embed_tokens", "layers", "norm")

# Other writers' prefixes -> the Hub's: names in memory of transformers 4.52 and newer, which some
# repositories carry, those of the language model that was saved alone, and MLX's.
_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
    **{f"model.{name}.": f"language_model.model.{name}." for name in _OF_TEXT},
    "vision_tower.": "vision_model.",
}


def hub_name(name: str) -> str:
    """The Hub's spelling of a tensor's name, given in that or in another writer's."""
    for other, hub in _PREFIXES.items():
        if name.startswith(other):
            return hub + name.removeprefix(other)
    return name


# What other formats call the same: the Hub's name -> Meta's and GGUF's. `.weight` and `.bias` may
# follow all three.
META, GGUF = 0, 1
ENCODER = "vision_model.vision_encoder."  # of Meta
_GATED = "gated_positional_embedding"
_OF_ENCODER = (
    ("class_embedding", "class_embedding", "class_embd"),
    ("patch_embedding", "conv1._linear", "patch_embd"),
    (f"{_GATED}.embedding", "positional_embedding", "position_embd.weight"),
    (f"{_GATED}.gate", f"{_GATED}_gate", "tile_position_embd.gate"),
    (f"{_GATED}.tile_embedding.weight", _GATED, "tile_position_embd.weight"),
    ("layernorm_pre", "ln_pre", "pre_ln"),
    ("layernorm_post", "ln_post", "post_ln"),
    *(
        (f"{place}_tile_positional_embedding{ours}", f"{place}_tile_pos_embed{meta}", name + gguf)
        for place, name in (("pre", "pre_tile_position_embd"), ("post", "post_tile_position_embd"))
        for ours, meta, gguf in (
            (".gate", ".gate", ".gate"),
            (".embedding.weight", ".embedding", ".weight"),
        )
    ),
)
_OUTSIDE_LAYERS = {
    "language_model.model.embed_tokens": ("text_model.tok_embeddings", "token_embd"),
    "language_model.model.norm": ("text_model.norm", "output_norm"),
    "language_model.lm_head": ("text_model.output", "output"),
    "multi_modal_projector": ("vision_model.vision_projection", "mm.0"),
    **{f"vision_model.{ours}": (ENCODER + meta, f"v.{gguf}") for ours, meta, gguf in _OF_ENCODER},
}
_OF_TEXT_LAYER = {
    "input_layernorm": ("attention_norm", "attn_norm"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
    **{f"self_attn.{p}_proj": (f"attention.w{p}", f"attn_{p}") for p in "qkv"},
    "self_attn.o_proj": ("attention.wo", "attn_output"),
    **{f"cross_attn.{p}_proj": (f"attention.w{p}", f"cross_attn_{p}_proj") for p in "qkvo"},
    **{f"cross_attn.{p}_norm": (f"attention.{p}_norm", f"cross_attn_{p}_norm") for p in "qk"},
    "cross_attn_attn_gate": ("gate_attn", "cross_attn_attn_gate"),
    "cross_attn_mlp_gate": ("gate_ffwd", "cross_attn_mlp_gate"),
}
_OF_VISION_LAYER = {
    **{f"self_attn.{p}_proj": (f"attn.w{p}", f"attn_{p}") for p in "qkv"},
    "self_attn.o_proj": ("attn.wo", "attn_output"),
    "mlp.fc1": ("mlp.c_fc", "ffn_up"),
    "mlp.fc2": ("mlp.c_proj", "ffn_down"),
    "input_layernorm": ("ln_1", "attn_norm"),
    "post_attention_layernorm": ("ln_2", "ffn_norm"),
    "gate_attn": ("gate_attn", "attn_gate"),
    "gate_ffn": ("gate_ffn", "ffn_gate"),
}
_NAME = re.compile(r"(?:(.+)\.layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?")


def other_name(name: str, writer: int, layer: Callable[[str, int], str]) -> str:
    """What the writer, META or GGUF, calls a tensor of the Hub's `name`.

    layer: from where a layer is, such as "vision_model.transformer", and its number to how the
    names of its tensors begin.
    """
    match = _NAME.fullmatch(name)
    assert match  # noqa: S101  # any name matches
    stack, number, part, kind = match.groups("")
    if not stack:
        whole = _OUTSIDE_LAYERS.get(name)
        return whole[writer] if whole else _OUTSIDE_LAYERS[part][writer] + kind
    of_layer = _OF_TEXT_LAYER if stack == "language_model.model" else _OF_VISION_LAYER
    return layer(stack, int(number)) + of_layer[part][writer] + kind


def hf_shapes(config: MllamaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, by the Hub's names."""
    vision, text = config.vision_config, config.text_config
    return {
        **{f"vision_model.{name}": shape for name, shape in _vision_shapes(vision).items()},
        **{f"language_model.{name}": shape for name, shape in _text_shapes(text).items()},
        **biased("multi_modal_projector", text.hidden_size, vision.output_dim),
    }


def _vision_shapes(c: VisionConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    tiles, tokens = c.max_num_tiles, c.tokens_per_tile
    table_rows = len(c.aspect_ratios) + 1  # row 0 belongs to padding
    shapes: dict[str, Shape] = {
        "class_embedding": (width,),
        "patch_embedding.weight": (width, c.num_channels, c.patch_size, c.patch_size),
        "gated_positional_embedding.gate": (1,),
        "gated_positional_embedding.embedding": (tokens, width),
        "gated_positional_embedding.tile_embedding.weight": (table_rows, tiles * tokens * width),
    }
    for place in ("pre", "post"):
        shapes[f"{place}_tile_positional_embedding.gate"] = (1,)
        shapes[f"{place}_tile_positional_embedding.embedding.weight"] = (table_rows, tiles * width)
        shapes |= biased(f"layernorm_{place}", width)
    layer: dict[str, Shape] = {
        **{f"self_attn.{p}_proj.weight": (width, width) for p in "qkvo"},
        **biased("mlp.fc1", inner, width),
        **biased("mlp.fc2", width, inner),
        **biased("input_layernorm", width),
        **biased("post_attention_layernorm", width),
    }
    gated = layer | {"gate_attn": (1,), "gate_ffn": (1,)}
    shapes |= numbered("transformer.layers.", range(c.num_hidden_layers), layer)
    return shapes | numbered("global_transformer.layers.", range(c.num_global_layers), gated)


def _text_shapes(c: TextConfig) -> dict[str, Shape]:
    crossed = {
        **decoder_layer(c, "cross_attn"),
        **{f"cross_attn.{p}_norm.weight": (c.head_dim,) for p in "qk"},
        "cross_attn_attn_gate": (1,),
        "cross_attn_mlp_gate": (1,),
    }
    return {
        "model.embed_tokens.weight": (c.embedding_rows, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
        "lm_head.weight": (c.vocab_size, c.hidden_size),
        **numbered("model.layers.", c.self_attention_layers, decoder_layer(c)),
        **numbered("model.layers.", c.cross_attention_layers, crossed),
    }
