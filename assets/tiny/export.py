"""Write the trained weights as a checkpoint of the family."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    sha256_of,
    write_manifest,
)
from mmchat.models.mllama.config import VisionConfig
from mmchat.models.mllama.model import MllamaForConditionalGeneration


def export(model: MllamaForConditionalGeneration, path: Path) -> None:
    """Write `model` in bfloat16 under the Hub's names."""
    weights = model.state_dict()
    clear_unused_slots(weights, model.config.vision_config)
    tensors = {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    record(path.parent)


def record(folder: Path) -> None:
    """Write what the folder of the model should hold, for `mmchat verify`."""
    names = ("model.safetensors", "tokenizer.model")
    files = {
        name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name), None, put=False)
        for name in names
    }
    write_manifest(folder / MANIFEST_NAME, Manifest(files, source="assets/tiny/train.py"))


def clear_unused_slots(weights: dict[str, Tensor], config: VisionConfig) -> None:
    """Zero the tile tables where a canvas has no tile, as in every checkpoint of the family.

    This model never reads them; others add them to their padding tiles.
    """
    for name, table in weights.items():
        if "_tile_positional_embedding.embedding" in name or "tile_embedding" in name:
            slots = table.view(table.shape[0], config.max_num_tiles, -1)
            slots[0] = 0
            for row, (tiles_h, tiles_w) in enumerate(config.aspect_ratios, start=1):
                slots[row, tiles_h * tiles_w :] = 0
