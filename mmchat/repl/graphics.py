"""Pictures as terminals take them: kitty's graphics protocol, iTerm2's and Sixel.

Sources: sw.kovidgoyal.net/kitty/graphics-protocol; iterm2.com/documentation-images.html;
VT330/VT340 manual, chapter 14. Each function
returns the characters that draw at the cursor; where the cursor is afterwards depends on the
terminal, so that the caller puts it back.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from mmchat.images.png import png_bytes

KITTY_CHUNK = 4096  # characters of base64 in one escape sequence
BAND = 6  # rows of pixels in one row of sixels


def kitty(picture: Any, columns: int, rows: int) -> str:
    """An RGB picture stretched over `columns` x `rows` cells; the terminal answers nothing."""
    data = base64.b64encode(png_bytes(picture)).decode()
    chunks = [data[i : i + KITTY_CHUNK] for i in range(0, len(data), KITTY_CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks, start=1):
        # a=T: show at once; f=100: PNG; C=1: leave the cursor; q=2: no answer; m=1: more follows
        first = f"a=T,f=100,C=1,c={columns},r={rows}," if number == 1 else ""
        parts.append(f"\x1b_G{first}q=2,m={int(number < len(chunks))};{chunk}\x1b\\")
    return "".join(parts)


def iterm2(picture: Any, columns: int, rows: int) -> str:
    """An RGB picture stretched over `columns` x `rows` cells."""
    png = png_bytes(picture)
    how = f"inline=1;size={len(png)};width={columns};height={rows};preserveAspectRatio=0"
    return f"\x1b]1337;File={how}:{base64.b64encode(png).decode()}\x07"


def sixel(picture: Any, colors: int = 256) -> str:
    """An RGB picture pixel for pixel, in at most `colors` colours."""
    import numpy as np
    from PIL.Image import Dither

    few = picture.quantize(colors)
    pixels = np.asarray(picture.quantize(palette=few, dither=Dither.FLOYDSTEINBERG))  # [H, W]
    height, width = pixels.shape
    parts = [f'\x1bP0;1;0q"1;1;{width};{height}']
    percent = [round(value / 2.55) for value in few.getpalette() or []]
    for color in np.unique(pixels).tolist():
        red, green, blue = percent[3 * color : 3 * color + 3]
        parts.append(f"#{color};2;{red};{green};{blue}")
    for top in range(0, height, BAND):
        band = pixels[top : top + BAND]
        weights = (1 << np.arange(len(band)))[:, None]  # the top row is the lowest bit
        passes = []
        for color in np.unique(band).tolist():
            row = (((band == color) * weights).sum(0) + ord("?")).astype(np.uint8).tobytes()
            passes.append(f"#{color}{_run_lengths(row.decode().rstrip('?'))}")
        parts.append("$".join(passes) + "-")
    return "".join(parts) + "\x1b\\"


def _run_lengths(row: str) -> str:
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", row)
