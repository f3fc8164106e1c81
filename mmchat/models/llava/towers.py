"""The vision encoders that original checkpoints name and do not hold.

A checkpoint's file names one by a repository or, after a training of one's own, by a path of the
machine where that was. Only what is known here is looked for, by its last part; no path that a file
names is opened.
"""

from __future__ import annotations

from typing import Any

_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}
# Repository -> VisionConfig of it.
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": _LARGE | {"image_size": 224},
}


def known_tower(name: str) -> str | None:
    """The repository that a checkpoint means by `name`; None if it is none of the known."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return next((repo for repo in TOWERS if repo.rpartition("/")[2] == last), None)
