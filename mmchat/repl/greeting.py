"""The first screen of a chat: what can be shown to the model, and what to ask the built-in one."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.catalog.known import data_path

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec

LINES = (
    "Drop a picture into this window, or type its path, and ask about it.",
    "JPEG, PNG, WebP, GIF, TIFF, pages of a PDF; several at once; addresses, too.",
    "\\help lists the commands, Ctrl-D leaves.",
)
_TO_TRY = (
    ("dog.jpg", "What's in this image?"),
    ("", "What colour is the dog?"),
    ("street.jpg", "What's in this image?"),
)


def to_try(spec: ModelSpec) -> list[str]:
    """Lines that the built-in model answers well, in this order; none for other models."""
    pictures = {name: data_path("assets", name) for name, _ in _TO_TRY if name}
    if spec.packaged is None or not all(path.is_file() for path in pictures.values()):
        return []
    named = {name: f"{_shown(path)} " for name, path in pictures.items()}
    return [named.get(name, "") + text for name, text in _TO_TRY]


def _shown(path: Path) -> str:
    """As it can be typed here: from the working folder where that is shorter."""
    return shlex.quote(min(os.path.relpath(path), str(path), key=len))
