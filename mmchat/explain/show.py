"""Where an answer looked, as a file, as rows and as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmchat.explain.draw import draw_look
from mmchat.explain.look import Look, Word
from mmchat.explain.page import look_page
from mmchat.images.png import png_bytes

HEADS = ("word", "looked at", "of its reading")


def rendered(ending: str, look: Look, word: Word | None, question: str, model: str) -> bytes:
    """A page, which has every word, for ".html"; else a PNG of `word`, or of all without one."""
    if ending == ".html":
        return look_page(look, question, model).encode()
    return png_bytes(draw_look(look, word))


def look_rows(look: Look, chosen: Word | None) -> list[tuple[str, str, str]]:
    """Under HEADS: each word, or the chosen one, its brightest place, x and y in pixels, and the
    share of its reading that went there."""
    rows = []
    for word in [chosen] if chosen else look.words:
        maps = [(i, heat) for i, heat in enumerate(look.heat(word)) if heat is not None]
        if not maps:
            rows.append((word.text, "no picture", ""))
            continue
        image, heat = max(maps, key=lambda one: float(one[1].max()))
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        height, width = look.cells[image]
        place = f"{(column + 0.5) * width:.0f}, {(row + 0.5) * height:.0f}"
        if len(look.images) > 1:
            place += f" of picture {image + 1}"
        [share] = [seen.shares[row, column] for seen in word.seen if seen.image == image]
        rows.append((word.text, place, f"{share:.1%}"))
    return rows


def look_record(look: Look) -> dict[str, Any]:
    """The same as JSON: what --json and the server say.

    Sizes are (height, width) in pixels; heat is by rows, from 0 to 1; a picture that a word does
    not see is null. share: what of its reading the word gave to the picture's patches. source
    is left out where the pictures are.
    """
    sources = [{"source": image.source} for image in look.images] or [{} for _ in look.grids]
    pictures = zip(sources, look.grids, look.cells, strict=True)
    words = []
    for word in look.words:
        share = {seen.image: round(float(seen.shares.sum()), 4) for seen in word.seen}
        maps = look.heat(word)
        words.append(
            {
                "text": word.text,
                "start": word.start,
                "end": word.end,
                "pictures": [
                    None
                    if m is None
                    else {"share": share[i], "heat": m.astype(float).round(3).tolist()}
                    for i, m in enumerate(maps)
                ],
            }
        )
    return {
        "pictures": [
            {**source, "grid": list(grid), "cell": list(cell)} for source, grid, cell in pictures
        ],
        "words": words,
    }
