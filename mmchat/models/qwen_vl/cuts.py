"""How Qwen-VL is shared by ranks. The matrix behind the resampler is held whole."""

from __future__ import annotations

from mmchat.models.qwen_vl.config import HEAD_DIM, QwenVLConfig
from mmchat.parallel.slices import Cut, Cuts, heads, hidden, together


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
