"""The same tiny Mllama in transformers, with or without its two faults corrected.

Fault 1 (4.56 to 5.23 at least): the vision tower collects hidden states so that index i is the
output of layer i. The released checkpoints mean its input.
Fault 2 (all versions): positions before the first picture skip the feed-forward branch of a
cross-attention block but not its attention branch, in which they then see every picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmchat.models.mllama.config import MllamaConfig as OurConfig
from tests.models.mllama.oracle import CANVASES, CONFIG, IMAGE, Outputs, Row, image_positions
from tests.models.mllama.plain_mllama import cross_mask

if TYPE_CHECKING:  # takes seconds to import, which those who run other tests need not wait for
    from transformers import MllamaConfig, MllamaForConditionalGeneration

PAD = 4


def build(
    weights: dict[str, Tensor],
    *,
    shift_indices: bool = True,
    mask_rows: bool = True,
    attention: str = "sdpa",
    ours: OurConfig = CONFIG,
) -> MllamaForConditionalGeneration:
    """transformers' model with these weights; the two flags correct faults 1 and 2."""
    from transformers import MllamaForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = _config(ours)
    config._attn_implementation = attention
    with no_init_weights():  # all are set below
        model = MllamaForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.load_state_dict({_in_memory(name): value for name, value in weights.items()}, strict=True)
    if shift_indices:
        vision = model.model.vision_model
        vision.intermediate_layers_indices = [i - 1 for i in vision.intermediate_layers_indices]
    if mask_rows:
        for layer in model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                _mask_attention_branch(layer)
    return model.float().eval()


def _config(ours: OurConfig) -> MllamaConfig:
    from transformers.models.mllama import configuration_mllama as theirs

    vision, text = ours.vision_config, ours.text_config
    scaling = vars(text.rope_scaling) if text.rope_scaling else {}
    rope = {"rope_type": "llama3" if scaling else "default", **scaling}
    return theirs.MllamaConfig(
        vision_config=theirs.MllamaVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_global_layers=vision.num_global_layers,
            attention_heads=vision.attention_heads,
            vision_output_dim=vision.output_dim,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            max_num_tiles=vision.max_num_tiles,
            intermediate_layers_indices=list(vision.intermediate_layers_indices),
            norm_eps=vision.norm_eps,
            supported_aspect_ratios=[list(canvas) for canvas in CANVASES],
        ),
        text_config=theirs.MllamaTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            cross_attention_layers=list(text.cross_attention_layers),
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_position_embeddings,
            rope_parameters={"rope_theta": text.rope_theta, **rope},
            bos_token_id=1,
            eos_token_id=text.vocab_size - 1,
            pad_token_id=PAD,
        ),
        image_token_index=ours.image_token_id,
    )


def _in_memory(name: str) -> str:
    """transformers 4.52 and later rename the Hub's parameters in memory."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def _mask_attention_branch(layer: torch.nn.Module) -> None:
    """Erase the attention output of positions that see no picture, as the FFN output is."""
    state = {}

    def remember(module, arguments, keywords):
        state["rows"] = keywords["full_text_row_masked_out_mask"]

    def erase(module, arguments, output):
        rows = state["rows"]
        return output if rows is None else (output[0] * rows[:, 0], *output[1:])

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    layer.cross_attn.register_forward_hook(erase)


def inputs_of(rows: Sequence[Row], side: str = "right") -> dict[str, Tensor]:
    """Padded batch in transformers' form; rows without a picture are not supported there."""
    vision = CONFIG.vision_config
    width, most = max(len(ids) for ids, _ in rows), max(len(images) for _, images in rows)
    slots, pixels = vision.max_num_tiles, vision.image_size
    batch = {
        "input_ids": torch.full((len(rows), width), PAD),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "pixel_values": torch.zeros(len(rows), most, slots, 3, pixels, pixels),
        "aspect_ratio_ids": torch.zeros(len(rows), most, dtype=torch.long),
        "aspect_ratio_mask": torch.zeros(len(rows), most, slots, dtype=torch.long),
        "cross_attention_mask": torch.zeros(len(rows), width, most, slots, dtype=torch.long),
    }
    batch["aspect_ratio_mask"][:, :, 0] = 1
    for row, (ids, images) in enumerate(rows):
        first = width - len(ids) if side == "left" else 0
        place = slice(first, first + len(ids))
        batch["input_ids"][row, place] = torch.tensor(ids)
        batch["attention_mask"][row, place] = 1
        seen = cross_mask(ids, IMAGE)
        for i, image in enumerate(images):
            used = len(image.tensors[0])
            batch["pixel_values"][row, i, :used] = image.tensors[0]
            batch["aspect_ratio_ids"][row, i] = image.tensors[1].item()
            batch["aspect_ratio_mask"][row, i, :used] = 1
            batch["cross_attention_mask"][row, place, i, :used] = seen[:, i, None].long()
        assert len(image_positions(ids)) == len(images)
    if most == 0:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    return batch


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only; padding gets 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.inference_mode()
def run(model, rows: Sequence[Row], count: int, side: str = "right") -> Outputs:
    """Prefill and greedy decoding by `generate`, with transformers' own cache.

    Rows of different lengths decode only when padded on the left.
    """
    inputs = inputs_of(rows, side)
    mask = inputs["attention_mask"]
    logits = model(**inputs, position_ids=positions_of(mask)).logits
    prefill = [row[real.bool()] for row, real in zip(logits, mask, strict=True)]
    if side == "right" and not bool(mask.all()):
        return Outputs(prefill, torch.stack([row[-1:] for row in prefill]), torch.empty(0))
    made = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = made.sequences[:, mask.shape[1] :]
    return Outputs(prefill, torch.stack(made.logits, dim=1), tokens)
