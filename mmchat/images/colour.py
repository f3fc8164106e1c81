"""Turns a decoded picture of any mode into RGB, a strip at a time.

The results are those of the Hub's processor (alpha "white") and of Meta's reference ("drop"), but
for grey of more than 8 bits, which is scaled to 8 bits as Pillow scales 16-bit colour (the high
byte stays). Here we differ from both on purpose: Pillow's own conversion makes everything above
255 white.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from PIL import Image as PILImage

Alpha = Literal["white", "drop"]
Box = tuple[int, int, int, int]

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_STRIP_PIXELS = 1 << 20  # worked on at a time, so that large pictures are not copied whole
_DARK = 1 << 14  # grey of 16 bits that stays below is of a camera or scanner with 14 or fewer

_pillow_lock = threading.Lock()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about metadata and sizes; the sizes are checked elsewhere.

    The filters belong to the process, so threads take turns; they are put back at the end.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def strips(width: int, height: int) -> Iterator[Box]:
    """Boxes (left, top, right, bottom) that cover a picture from top to bottom."""
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def rgb_strips(picture: PILImage.Image, alpha: Alpha) -> Iterator[tuple[Box, PILImage.Image]]:
    """The picture as RGB: each strip with its place. Pictures of a deep mode go in as 8 bits.

    alpha: "white" composites transparent pixels over white, "drop" ignores their transparency.
    """
    on_white = alpha == "white" and picture.has_transparency_data
    for box in strips(*picture.size):
        strip = picture if box == (0, 0, *picture.size) else picture.crop(box)
        if strip.mode in _PREMULTIPLIED:
            strip = strip.convert(_PREMULTIPLIED[strip.mode])
        if on_white:
            strip = strip.convert("RGBA")
            white = PILImage.new("RGBA", strip.size, (255, 255, 255, 255))
            strip = PILImage.alpha_composite(white, strip)
        elif "transparency" in strip.info:
            strip = strip.copy()
            del strip.info["transparency"]
        yield box, strip if strip.mode == "RGB" else strip.convert("RGB")


def new_hash(width: int, height: int) -> hashlib._Hash:
    """The hash of a picture, which waits for the pixels.

    It begins with mode and size, so that equal bytes of another shape differ.
    """
    return hashlib.sha256(f"RGB {width} {height}\n".encode())


def eight_bits(picture: PILImage.Image) -> tuple[PILImage.Image, list[str]]:
    """Scale a grey picture of 16 or 32 bits, or of real numbers, to 8 bits; others as they are.

    16 bits: the high byte. 32 bits and real numbers: by the range that the values use (0..1,
    0..255, 0..65535), else stretched from their least to their greatest. A transparent grey
    (`info["transparency"]`, on the scale of the values) becomes an alpha channel. Returns the
    notices as well.
    """
    if picture.mode not in _DEEP_MODES:
        return picture, []
    import numpy as np

    boxes = list(strips(*picture.size))
    ranges = [_range(picture.crop(box)) for box in boxes]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    key = picture.info.get("transparency")
    grey = PILImage.new("L" if key is None else "LA", picture.size)
    for box in boxes:
        values = np.asarray(picture.crop(box))
        strip = PILImage.fromarray(_scaled(values, low, high))
        if key is not None:
            strip.putalpha(PILImage.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        grey.paste(strip, box)
    notices = []
    is_of_16_bits = "16" in picture.mode or (picture.mode == "I" and low >= 0 and high > 255)
    if is_of_16_bits and 0 < high < _DARK:
        notices.append(
            f"its grey values reach only {high:,.0f} of 65,535, so it is dark; brighten it first"
        )
    return grey, notices


def _finite(values: Any) -> Any:
    """Values as float32; what is no finite number becomes 0."""
    import numpy as np

    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _range(strip: PILImage.Image) -> tuple[float, float]:
    """The least and the greatest value."""
    import numpy as np

    values = _finite(np.asarray(strip))
    return float(values.min()), float(values.max())


def _scaled(values: Any, low: float, high: float) -> Any:
    """Values of a picture between `low` and `high` on the scale of 8 bits; see `eight_bits`."""
    import numpy as np

    if values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    is_real = values.dtype.kind == "f"
    real = _finite(values)
    if low < 0 or high > 65_535 or (is_real and high > 255):
        scale = 255 / ((high - low) or 1)
        real = real * np.float32(scale) - np.float32(low * scale)
    elif high > 255:
        real = np.floor(real / 256)
    elif is_real and high <= 1:
        real = real * 255
    return real.clip(0, 255).astype(np.uint8)
