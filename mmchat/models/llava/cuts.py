"""How LLaVA is shared by ranks."""

from __future__ import annotations

from mmchat.models.llava.config import LlavaConfig
from mmchat.parallel.slices import Cuts, decoder_cuts, heads, hidden


def shared_heads(config: LlavaConfig) -> dict[str, int]:
    text, vision = config.text_config, config.vision_config
    return {
        "heads": text.num_attention_heads,
        "key and value heads": text.num_key_value_heads,
        "vision heads": vision.num_attention_heads,
    }


def cuts(config: LlavaConfig) -> Cuts:
    text, vision = config.text_config, config.vision_config
    count, size = vision.num_attention_heads, vision.head_dim
    return {
        **decoder_cuts("language_model.", text),
        "vision_tower.*.self_attn.[qkv]_proj": heads(count, size),
        "vision_tower.*.self_attn.out_proj": heads(count, size, 1),
        "vision_tower.*.mlp.fc1": hidden(vision.intermediate_size),
        "vision_tower.*.mlp.fc2": hidden(vision.intermediate_size, 1),
        "multi_modal_projector.linear_1": hidden(text.hidden_size),
        "multi_modal_projector.linear_2": hidden(text.hidden_size, 1),
    }
