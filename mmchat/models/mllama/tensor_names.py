"""Names and shapes of Mllama's tensors on the Hub, in the spelling of its checkpoints."""

from __future__ import annotations

from mmchat.models.mllama.config import MllamaConfig, TextConfig, VisionConfig
from mmchat.models.shapes import Shape, biased, decoder_layer, numbered

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
