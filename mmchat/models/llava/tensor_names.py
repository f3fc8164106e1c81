"""Names and shapes of LLaVA's tensors on the Hub, and the other spellings of them."""

from __future__ import annotations

import re

from mmchat.models.family import COMPANION
from mmchat.models.llava.config import LlavaConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]

VISION = "vision_tower.vision_model."

# How other writers begin a name -> how the Hub's checkpoints of LLaVA-1.5 do. The first that fits
# counts. `model.…` without more are the original checkpoints' own, the rest is what transformers
# calls its modules from 4.52 on; from 5 on it saves the encoder without `vision_model.`.
_SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", VISION),  # original, trained with the rest
    ("model.vision_tower.vision_model.", VISION),
    ("model.vision_tower.", VISION),
    (VISION, VISION),
    ("vision_tower.", VISION),
    (f"{COMPANION}vision_model.", VISION),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# What a repository of CLIP holds beside the encoder of pictures.
_OF_CLIP = re.compile(
    rf"{re.escape(COMPANION)}(text_model\..+|(text|visual)_projection\.weight|logit_scale)"
)


def hub_name(name: str) -> str | None:
    """The Hub's spelling of a tensor's name; None for what no LLaVA needs."""
    if _OF_CLIP.fullmatch(name):
        return None
    for start, hub in _SPELLINGS:
        if name.startswith(start):
            return hub + name.removeprefix(start)
    if name.startswith(COMPANION):  # an encoder that was saved alone
        return VISION + name.removeprefix(COMPANION)
    return name


def hub_shapes(config: LlavaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, by the Hub's names."""
    vision, text = config.vision_config, config.text_config
    width = text.hidden_size
    shapes = {f"{VISION}{name}": shape for name, shape in _vision_shapes(vision).items()}
    shapes |= {
        "multi_modal_projector.linear_1.weight": (width, vision.hidden_size),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    return shapes | {f"language_model.{n}": shape for n, shape in _text_shapes(text).items()}


def is_unused(name: str, config: LlavaConfig) -> bool:
    """Whether the tensor, by the Hub's name, comes behind the features that the text is given."""
    if name.startswith(f"{VISION}post_layernorm."):
        return True
    layer = re.match(rf"{re.escape(VISION)}encoder\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= config.vision_layers_used


def _vision_shapes(c: VisionConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    shapes: dict[str, Shape] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, c.num_channels, c.patch_size, c.patch_size),
        "embeddings.position_embedding.weight": (c.num_patches + 1, width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    layer: dict[str, Shape] = {f"self_attn.{p}_proj.weight": (width, width) for p in "qkv"}
    layer |= {f"self_attn.{p}_proj.bias": (width,) for p in "qkv"}
    layer |= {"self_attn.out_proj.weight": (width, width), "self_attn.out_proj.bias": (width,)}
    layer |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
    layer |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
    for norm in ("layer_norm1", "layer_norm2"):
        layer |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(c.num_hidden_layers):
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _text_shapes(c: TextConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    keys = c.num_key_value_heads * c.head_dim
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (c.vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (c.vocab_size, width),
    }
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    for i in range(c.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes
