"""Names and shapes of Qwen-VL's tensors."""

from __future__ import annotations

from mmchat.models.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig
from mmchat.models.shapes import Shape, biased, numbered

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
