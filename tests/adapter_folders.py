"""Adapters as peft writes them, made by hand, and what a model is with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny",
    "task_type": None,
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "inference_mode": True,
}


def newer(name: str) -> str:
    """The name of Mllama's module in transformers 4.52 and newer."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return f"model.{name}"
    return name.removeprefix("language_model.")


def low_rank(
    weights: Mapping[str, Tensor], modules: Sequence[str], rank: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """lora_A and lora_B of modules, by their own names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        rows, columns = weights[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 8
    return tensors


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], prefix: str = PREFIX, **changed: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changed))
    stored = {prefix + name: tensor.clone() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merged(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], scale: float = 2.0
) -> dict[str, Tensor]:
    """The weights with what `low_rank` gave, float32."""
    result = {name: tensor.float() for name, tensor in weights.items()}
    for name, b in tensors.items():
        if name.endswith(".lora_B.weight"):
            module = name.removesuffix(".lora_B.weight")
            a = tensors[f"{module}.lora_A.weight"]
            result[f"{module}.weight"] = result[f"{module}.weight"] + (b @ a) * scale
    return result
