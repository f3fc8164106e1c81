"""Write the trained weights as a checkpoint of the family."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from trainee import TILE_TABLES, share_tiles

from mmchat.checkpoints.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    sha256_of,
    write_manifest,
)
from mmchat.models.mllama.model import MllamaForConditionalGeneration

TOKENIZER = Path(__file__).resolve().with_name("tokenizer.model")


def export(model: MllamaForConditionalGeneration, path: Path) -> None:
    """Write `model` in bfloat16 under the Hub's names, with tile tables that canvases share.

    The tokenizer goes beside them.
    """
    weights = model.state_dict()
    for name, table in weights.items():
        if name.endswith(TILE_TABLES):
            weights[name] = share_tiles(table, model.config.vision_config)
    tensors = {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    if path.parent.resolve() != TOKENIZER.parent:
        shutil.copy(TOKENIZER, path.parent)
    record(path.parent)


def record(folder: Path) -> None:
    """Write what the folder of the model should hold, for `mmchat verify`."""
    names = ("model.safetensors", "tokenizer.model")
    files = {
        name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name), None, put=False)
        for name in names
    }
    write_manifest(folder / MANIFEST_NAME, Manifest(files, source="assets/tiny/train.py"))
