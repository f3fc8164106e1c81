"""Pictures to time: drawn, each another."""

from __future__ import annotations

import io
import itertools
import math
from typing import TYPE_CHECKING

from mmchat.errors import UsageError

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec


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


def picture_of(spec: ModelSpec, cells: int, seed: int) -> bytes:
    """A file of a picture that the model cuts into so many; UsageError if it never does."""
    size = spec.family.picture_size(spec.config, cells)
    if size is None:
        raise UsageError(f"{spec.name} cuts no picture into {cells}; ask for fewer")
    return picture_file(*size, seed)


def fewest_and_most(spec: ModelSpec) -> list[int]:
    """Into how many the model cuts its smallest and its largest pictures."""
    most = math.prod(spec.family.sizes(spec.config).largest_picture.grid)
    fewest = (n for n in range(1, most) if spec.family.picture_size(spec.config, n))
    return [*itertools.islice(fewest, 1), most]
