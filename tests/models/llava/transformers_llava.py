"""The same tiny LLaVA in transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
)
from transformers import LlavaConfig as TheirConfig
from transformers.initialization import no_init_weights

from mmchat.models.llava.config import LlavaConfig
from tests.models.llava.oracle import CONFIG, Part, Pixels

IMAGE = 40  # in transformers the mark of a picture is a token of the vocabulary


def build(
    weights: dict[str, Tensor], config: LlavaConfig = CONFIG, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    theirs = their_config(config)
    theirs._attn_implementation = attention
    with no_init_weights():  # all are set below
        model = LlavaForConditionalGeneration._from_config(theirs, attn_implementation=attention)
    state = {in_memory(name): value for name, value in weights.items()}
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def their_config(config: LlavaConfig) -> TheirConfig:
    vision, text = config.vision_config, config.text_config
    return TheirConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act="quick_gelu",
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text_config=LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=config.features.layer,
        vision_feature_select_strategy=config.features.strategy,
        image_seq_length=config.positions_per_image,
    )


def in_memory(name: str) -> str:
    """How transformers 5 calls a tensor of the Hub."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.", 1)
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.", 1)


@torch.inference_mode()
def run(
    model: LlavaForConditionalGeneration, parts: Sequence[Part], steps: int, count: int
) -> tuple[Tensor, list[int]]:
    """Logits [N, V] of the prompt and of the tokens chosen after it, but for the last; the tokens.

    count: positions of a picture.
    """
    ids, pixels = [], []
    for part in parts:
        if isinstance(part, Pixels):
            ids += [IMAGE] * count
            pixels.append(part.tensors[0])
        else:
            ids.append(part)
    tokens = torch.tensor([ids])
    given = {"pixel_values": torch.stack(pixels)} if pixels else {}
    output = model(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **given
    )
    rows, said = [output.logits[0]], []
    for _ in range(steps):
        said.append(int(rows[-1][-1].argmax()))
        step = torch.tensor([said[-1:]])
        mask = torch.ones(1, len(ids) + len(said), dtype=torch.long)
        past = output.past_key_values
        output = model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
        rows.append(output.logits[0])
    return torch.cat(rows), said
