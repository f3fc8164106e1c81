"""Pictures to time: drawn, each another, of as many tiles as are asked for."""

from __future__ import annotations

import io


def picture_file(height: int, width: int, seed: int) -> bytes:
    """A JPEG of coarse and fine noise, another for each seed, so that nothing is found in a cache.

    Its size in bytes is about that of a photograph.
    """
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = random.integers(-12, 13, (height, width, 1))
    pixels = np.clip(np.asarray(picture).astype(np.int16) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def picture_size(tiles: int, tile_size: int) -> tuple[int, int]:
    """(height, width) of a picture that takes so many tiles, two rows of them from 4 on."""
    rows = 2 if tiles == 4 else 1
    return rows * tile_size, tiles // rows * tile_size
