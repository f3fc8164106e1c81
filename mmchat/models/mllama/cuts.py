"""How Mllama is shared by ranks."""

from __future__ import annotations

from mmchat.models.mllama.config import MllamaConfig
from mmchat.parallel.slices import Cut, Cuts, decoder_cuts, heads, hidden


def shared_heads(config: MllamaConfig) -> dict[str, int]:
    text, vision = config.text_config, config.vision_config
    return {
        "heads": text.num_attention_heads,
        "key and value heads": text.num_key_value_heads,
        "vision heads": vision.attention_heads,
    }


def cuts(config: MllamaConfig) -> Cuts:
    text, vision = config.text_config, config.vision_config
    count, size = vision.attention_heads, vision.head_dim
    return {
        **decoder_cuts("language_model.", text),
        "vision_model.*.self_attn.[qkv]_proj": heads(count, size),
        "vision_model.*.self_attn.o_proj": heads(count, size, 1),
        "vision_model.*.mlp.fc1": hidden(vision.intermediate_size),
        "vision_model.*.mlp.fc2": hidden(vision.intermediate_size, 1),
        "multi_modal_projector": Cut(0, (text.hidden_size,), gathered="all"),
    }
