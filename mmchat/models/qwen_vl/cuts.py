"""How Qwen-VL is shared by ranks. The matrix behind the resampler is held whole."""

from __future__ import annotations

from mmchat.models.qwen_vl.config import HEAD_DIM, QwenVLConfig
from mmchat.parallel.slices import Cut, Cuts, heads, hidden, together


def shared_heads(config: QwenVLConfig) -> dict[str, int]:
    text = config.text_config
    return {
        "heads": text.num_attention_heads,
        "vision heads": config.vision_config.heads,
        "heads of the resampler": text.hidden_size // HEAD_DIM,
    }


def cuts(config: QwenVLConfig) -> Cuts:
    text, vision = config.text_config, config.vision_config
    own = heads(text.num_attention_heads, text.head_dim)
    inner, of_vision = hidden(text.intermediate_size), hidden(vision.intermediate_size)
    resampler = heads(text.hidden_size // HEAD_DIM, HEAD_DIM)
    return {
        "transformer.h.*.attn.c_attn": together(own, own, own),
        "transformer.h.*.attn.c_proj": heads(text.num_attention_heads, text.head_dim, 1),
        "transformer.h.*.mlp.w[12]": inner,
        "transformer.h.*.mlp.w12": together(inner, inner),
        "transformer.h.*.mlp.c_proj": hidden(text.intermediate_size, 1),
        "lm_head": Cut(0, (text.vocab_size,), gathered="first"),
        # query, key and value of each head one behind the other
        "transformer.visual.transformer.*.attn.in_proj": heads(vision.heads, 3 * vision.head_dim),
        "transformer.visual.transformer.*.attn.out_proj": heads(vision.heads, vision.head_dim, 1),
        "transformer.visual.transformer.*.mlp.c_fc": of_vision,
        "transformer.visual.transformer.*.mlp.c_proj": hidden(vision.intermediate_size, 1),
        "transformer.visual.attn_pool.kv_proj": Cut(0, (text.hidden_size,), gathered="all"),
        "transformer.visual.attn_pool.attn.in_proj_*": together(resampler, resampler, resampler),
        "transformer.visual.attn_pool.attn.out_proj": heads(
            text.hidden_size // HEAD_DIM, HEAD_DIM, 1
        ),
    }
