"""Pictures for batches."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def draw(name: str | Path, colour: tuple[int, int, int] = (200, 30, 30)) -> str:
    """A small picture; its folders are made."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("RGB", (80, 60), colour).save(file, "PNG")
    return str(path)
