"""Names and shapes of Qwen-VL's tensors."""

from __future__ import annotations

from mmchat.models.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]

VISION = "transformer.visual."
# What older writers saved beside the parameters; it is computed here.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias")


def hub_name(name: str) -> str | None:
    """The name; None for what no model needs."""
    return None if name.startswith("transformer.") and name.endswith(_COMPUTED) else name


def hub_shapes(config: QwenVLConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model."""
    text = config.text_config
    shapes: dict[str, Shape] = {"transformer.wte.weight": (text.vocab_size, text.hidden_size)}
    for i in range(text.num_hidden_layers):
        shapes |= {f"transformer.h.{i}.{n}": shape for n, shape in _layer(text).items()}
    shapes["transformer.ln_f.weight"] = (text.hidden_size,)
    vision = _vision(config.vision_config, text.hidden_size)
    shapes |= {f"{VISION}{name}": shape for name, shape in vision.items()}
    return shapes | {"lm_head.weight": (text.vocab_size, text.hidden_size)}


def _layer(c: TextConfig) -> dict[str, Shape]:
    width, inner = c.hidden_size, c.intermediate_size
    return {
        "ln_1.weight": (width,),
        "attn.c_attn.weight": (3 * width, width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "ln_2.weight": (width,),
        "mlp.w1.weight": (inner, width),
        "mlp.w2.weight": (inner, width),
        "mlp.c_proj.weight": (width, inner),
    }


def _vision(c: VisionConfig, size: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        "positional_embedding": (c.n_queries, c.width),
        "proj": (size, size),
        "conv1.weight": (c.width, 3, c.patch_size, c.patch_size),
        **_biased("ln_pre", c.width),
    }
    layer = {
        **_biased("ln_1", c.width),
        **_biased("attn.in_proj", 3 * c.width, c.width),
        **_biased("attn.out_proj", c.width, c.width),
        **_biased("ln_2", c.width),
        **_biased("mlp.c_fc", c.intermediate_size, c.width),
        **_biased("mlp.c_proj", c.width, c.intermediate_size),
    }
    for i in range(c.layers):
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in layer.items()}
    resampler = {
        "query": (c.n_queries, size),
        "pos_embed": (c.n_queries, size),
        "kv_proj.weight": (size, c.width),
        "attn.in_proj_weight": (3 * size, size),
        "attn.in_proj_bias": (3 * size,),
        **_biased("attn.out_proj", size, size),
        **_biased("ln_q", size),
        **_biased("ln_kv", size),
    }
    shapes |= {f"attn_pool.{name}": shape for name, shape in resampler.items()}
    return shapes | _biased("ln_post", size)


def _biased(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
