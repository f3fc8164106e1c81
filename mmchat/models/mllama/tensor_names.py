"""Names and shapes of Mllama's tensors on the Hub, in the spelling of its checkpoints."""

from __future__ import annotations

from mmchat.models.mllama.config import MllamaConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]
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


def hf_shapes(config: MllamaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, by the Hub's names."""
    vision, text = config.vision_config, config.text_config
    shapes = {f"vision_model.{name}": shape for name, shape in _vision_shapes(vision).items()}
    shapes |= {f"language_model.{name}": shape for name, shape in _text_shapes(text).items()}
    shapes["multi_modal_projector.weight"] = (text.hidden_size, vision.output_dim)
    shapes["multi_modal_projector.bias"] = (text.hidden_size,)
    return shapes


def _vision_shapes(c: VisionConfig) -> dict[str, Shape]:
    width, tiles, tokens = c.hidden_size, c.max_num_tiles, c.tokens_per_tile
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
        shapes[f"layernorm_{place}.weight"] = shapes[f"layernorm_{place}.bias"] = (width,)
    layer = _vision_layer_shapes(c)
    for i in range(c.num_hidden_layers):
        shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    layer |= {"gate_attn": (1,), "gate_ffn": (1,)}
    for i in range(c.num_global_layers):
        shapes |= {f"global_transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _vision_layer_shapes(c: VisionConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    shapes: dict[str, Shape] = {f"self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
    shapes |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
    shapes |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return shapes


def _text_shapes(c: TextConfig) -> dict[str, Shape]:
    width = c.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (c.embedding_rows, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (c.vocab_size, width),
    }
    for i in range(c.num_hidden_layers):
        layer = _text_layer_shapes(c, is_cross=i in c.cross_attention_layers)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _text_layer_shapes(c: TextConfig, is_cross: bool) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = "cross_attn" if is_cross else "self_attn"
    shapes: dict[str, Shape] = {
        f"{attention}.q_proj.weight": (queries, width),
        f"{attention}.k_proj.weight": (keys, width),
        f"{attention}.v_proj.weight": (keys, width),
        f"{attention}.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if is_cross:
        shapes |= {f"cross_attn.{p}_norm.weight": (c.head_dim,) for p in "qk"}
        shapes |= {"cross_attn_attn_gate": (1,), "cross_attn_mlp_gate": (1,)}
    return shapes
