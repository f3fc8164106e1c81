"""Names and shapes of Qwen-VL's tensors."""

from __future__ import annotations

from functools import lru_cache

from mmchat.models.qwen_vl.config import HEAD_DIM, QwenVLConfig, TextConfig, VisionConfig, facts
from mmchat.models.sizes import (
    DECODER,
    EMBEDDING,
    ENCODER,
    EmbeddingSizes,
    PartName,
    Shape,
    biased,
    numbered,
    parts_of,
)
from mmchat.parallel.slices import Cut, Cuts, heads, hidden, together

VISION = "transformer.visual."
# What older writers saved beside the parameters; it is computed here.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias")


def hub_name(name: str) -> str | None:
    """The name; None for what no model needs."""
    return None if name.startswith("transformer.") and name.endswith(_COMPUTED) else name


def hub_shapes(config: QwenVLConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model."""
    text = config.text_config
    vision = _vision(config.vision_config, text.hidden_size)
    return {
        "transformer.wte.weight": (text.vocab_size, text.hidden_size),
        **numbered("transformer.h.", range(text.num_hidden_layers), _layer(text)),
        "transformer.ln_f.weight": (text.hidden_size,),
        **{f"{VISION}{name}": shape for name, shape in vision.items()},
        "lm_head.weight": (text.vocab_size, text.hidden_size),
    }


def _layer(c: TextConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    return {
        "ln_1.weight": (width,),
        **biased("attn.c_attn", 3 * width, width),
        "attn.c_proj.weight": (width, width),
        "ln_2.weight": (width,),
        "mlp.w1.weight": (inner, width),
        "mlp.w2.weight": (inner, width),
        "mlp.c_proj.weight": (width, inner),
    }


def _vision(c: VisionConfig, size: int) -> dict[str, Shape]:
    layer = {
        **biased("ln_1", c.width),
        **biased("attn.in_proj", 3 * c.width, c.width),
        **biased("attn.out_proj", c.width, c.width),
        **biased("ln_2", c.width),
        **biased("mlp.c_fc", c.intermediate_size, c.width),
        **biased("mlp.c_proj", c.width, c.intermediate_size),
    }
    return {
        "positional_embedding": (c.n_queries, c.width),
        "proj": (size, size),
        "conv1.weight": (c.width, 3, c.patch_size, c.patch_size),
        **biased("ln_pre", c.width),
        **numbered("transformer.resblocks.", range(c.layers), layer),
        "attn_pool.query": (c.n_queries, size),
        "attn_pool.pos_embed": (c.n_queries, size),
        "attn_pool.kv_proj.weight": (size, c.width),
        "attn_pool.attn.in_proj_weight": (3 * size, size),
        "attn_pool.attn.in_proj_bias": (3 * size,),
        **biased("attn_pool.attn.out_proj", size, size),
        **biased("attn_pool.ln_q", size),
        **biased("attn_pool.ln_kv", size),
        **biased("ln_post", size),
    }


def cuts(config: QwenVLConfig) -> Cuts:
    text, vision = config.text_config, config.vision_config
    own, inner = heads(text.num_attention_heads, text.head_dim), hidden(text.intermediate_size)
    # query, key and value of each head one behind the other
    joined = heads(vision.heads, 3 * vision.head_dim, "vision heads")
    seeing = heads(vision.heads, vision.head_dim, "vision heads")
    units = hidden(vision.intermediate_size)
    resampler = heads(text.hidden_size // HEAD_DIM, HEAD_DIM, "heads of the resampler")
    return {
        "transformer.h.*.attn.c_attn": together(own, own, own),
        "transformer.h.*.attn.c_proj": own.columns,
        "transformer.h.*.mlp.w[12]": inner,
        "transformer.h.*.mlp.w12": together(inner, inner),
        "transformer.h.*.mlp.c_proj": inner.columns,
        "lm_head": Cut(0, (text.vocab_size,), gathered="first"),
        "transformer.visual.transformer.*.attn.in_proj": joined,
        "transformer.visual.transformer.*.attn.out_proj": seeing.columns,
        "transformer.visual.transformer.*.mlp.c_fc": units,
        "transformer.visual.transformer.*.mlp.c_proj": units.columns,
        "transformer.visual.attn_pool.kv_proj": Cut(0, (text.hidden_size,), gathered="all"),
        "transformer.visual.attn_pool.attn.in_proj_*": together(resampler, resampler, resampler),
        "transformer.visual.attn_pool.attn.out_proj": resampler.columns,
    }


_PARTS: dict[str, PartName] = {
    f"{VISION}transformer.": ENCODER,
    VISION: ("patches and resampler", "vision", "seldom"),
    "transformer.h.": DECODER,
    "transformer.wte.": EMBEDDING,
}


@lru_cache(maxsize=16)  # `doctor` asks for each model in each scheme
def footprint(config: QwenVLConfig) -> EmbeddingSizes:
    """Sizes that follow from the configuration alone."""
    text, vision = config.text_config, config.vision_config
    return EmbeddingSizes(
        parts=parts_of(hub_shapes(config), _PARTS, is_table=lambda name: ".wte." in name),
        cache_per_token=2 * text.hidden_size * text.num_hidden_layers,
        head_dim=text.head_dim,
        largest_picture=facts(config, vision.image_size, vision.image_size),
        once_a_picture=(),
        text=text,
        patches=vision.num_patches,
        width=vision.width,
        intermediate_size=vision.intermediate_size,
        # states; what they become, with positions; keys and values
        behind=vision.width + 5 * text.hidden_size,
    )
