"""Tiny random LLaVAs as folders, in the Hub's format and in the original one with its tower apart.

They answer nonsense: what is shown with them is that all of the program takes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmchat.models.llava.config import LlavaConfig
from tests.models.llava.oracle import CONFIG, random_weights
from tests.sentencepiece_model import trained

SPARE_ROWS = 8  # of the Hub's embedding and head, behind the tokenizer's ids


def with_vocabulary(spare: int) -> LlavaConfig:
    from sentencepiece import SentencePieceProcessor

    tokens = SentencePieceProcessor(model_proto=trained()).vocab_size()
    return replace(CONFIG, text_config=replace(CONFIG.text_config, vocab_size=tokens + spare))


def hub_document(config: LlavaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.vocab_size - 1,
        "vision_feature_layer": config.features.layer,
        "vision_feature_select_strategy": config.features.strategy,
        "vision_config": asdict(config.vision_config),
        "text_config": asdict(config.text_config),
    }


def write_hub_folder(
    folder: Path, weights: Mapping[str, Tensor] | None = None, **changed: Any
) -> Path:
    """config.json, model.safetensors and tokenizer.model, as in llava-hf's repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    config = with_vocabulary(SPARE_ROWS)
    (folder / "config.json").write_text(json.dumps(hub_document(config) | changed))
    tensors = dict(random_weights(config)) if weights is None else dict(weights)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.model").write_bytes(trained())
    return folder


ORIGINAL_NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
)


def original_names(
    weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """What an original checkpoint holds of the Hub's tensors; the tower is left out."""
    found = {}
    for name, tensor in weights.items():
        for hub, original in ORIGINAL_NAMES:
            if name.startswith(hub):
                found[original + name.removeprefix(hub)] = tensor.to(dtype)
    for i in range(CONFIG.text_config.num_hidden_layers):
        found[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    return found


def tower_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a repository of CLIP holds, its other half included."""
    start = "vision_tower."
    found = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
    found["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    found["text_model.final_layer_norm.weight"] = torch.ones(4)
    found |= {f"{kind}_projection.weight": torch.ones(2, 2) for kind in ("text", "visual")}
    return found | {"logit_scale": torch.tensor(2.6)}
