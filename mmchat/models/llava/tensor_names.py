"""Names and shapes of LLaVA's tensors on the Hub, and the other spellings of them."""

from __future__ import annotations

import re
from functools import lru_cache

from mmchat.models.family import COMPANION
from mmchat.models.llava.config import LlavaConfig, VisionConfig
from mmchat.models.llava.squares import facts
from mmchat.models.sizes import (
    DECODER,
    EMBEDDING,
    ENCODER,
    PROJECTOR,
    EmbeddingSizes,
    PartName,
    Shape,
    biased,
    decoder_layer,
    numbered,
    parts_of,
)

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
    width, table = text.hidden_size, (text.vocab_size, text.hidden_size)
    return {
        **{f"{VISION}{name}": shape for name, shape in _vision_shapes(vision).items()},
        **biased("multi_modal_projector.linear_1", width, vision.hidden_size),
        **biased("multi_modal_projector.linear_2", width, width),
        "language_model.model.embed_tokens.weight": table,
        "language_model.model.norm.weight": (width,),
        "language_model.lm_head.weight": table,
        **numbered(
            "language_model.model.layers.", range(text.num_hidden_layers), decoder_layer(text)
        ),
    }


def unused(config: LlavaConfig) -> tuple[str, ...]:
    """How the Hub's names begin of what comes behind the features that the text is given."""
    behind = range(config.vision_layers_used, config.vision_config.num_hidden_layers)
    return (f"{VISION}post_layernorm.", *(f"{VISION}encoder.layers.{i}." for i in behind))


def _vision_shapes(c: VisionConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    layer = {
        **biased("self_attn.q_proj", width, width),
        **biased("self_attn.k_proj", width, width),
        **biased("self_attn.v_proj", width, width),
        **biased("self_attn.out_proj", width, width),
        **biased("mlp.fc1", inner, width),
        **biased("mlp.fc2", width, inner),
        **biased("layer_norm1", width),
        **biased("layer_norm2", width),
    }
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, c.num_channels, c.patch_size, c.patch_size),
        "embeddings.position_embedding.weight": (c.num_patches + 1, width),
        **biased("pre_layrnorm", width),
        **biased("post_layernorm", width),
        **numbered("encoder.layers.", range(c.num_hidden_layers), layer),
    }


_UNUSED: PartName = ("vision layers that are not used", "vision", "never")
_PARTS = {
    "vision_tower.": ENCODER,
    "multi_modal_projector.": PROJECTOR,
    "language_model.model.layers.": DECODER,
    "language_model.model.embed_tokens.": EMBEDDING,
}


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: LlavaConfig) -> EmbeddingSizes:
    """Sizes that follow from the configuration alone."""
    text, vision = config.text_config, config.vision_config
    return EmbeddingSizes(
        parts=parts_of(hub_shapes(config), dict.fromkeys(unused(config), _UNUSED) | _PARTS),
        cache_per_token=2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers,
        head_dim=text.head_dim,
        largest_picture=facts(config, vision.image_size, vision.image_size),
        once_a_picture=(),
        text=text,
        patches=vision.num_patches + 1,
        width=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        behind=vision.hidden_size + 3 * text.hidden_size,
    )
