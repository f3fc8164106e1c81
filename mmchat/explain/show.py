"""Where an answer looked, as a picture, as a web page, as rows and as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mmchat.explain.draw import CAPTION, draw_look
from mmchat.explain.look import Look, Word
from mmchat.images.png import png_bytes, png_url

HEADS = ("word", "looked at", "of its reading")
_SIDE = 1024  # of a picture in the page, pixels
_WIDTH, _HEIGHT, _GAP = 640, 480, 16  # at most that it is shown in; between two
_COLUMN = 960  # of the page


def rendered(ending: str, look: Look, word: Word | None, question: str, model: str) -> bytes:
    """A page, which has every word, for ".html"; else a PNG of `word`, or of all without one."""
    if ending == ".html":
        return look_page(look, question, model).encode()
    return png_bytes(draw_look(look, word))


def look_page(look: Look, question: str, model: str) -> str:
    """A page in which a word that is pointed at lights its places up.

    It loads nothing, so that it works offline and can be sent.
    """
    title = html.escape(look.answer.strip()[:80])
    figures = []
    room = max(200, _COLUMN // len(look.images) - _GAP)
    for image in look.images:
        small = image.pixels.copy()
        small.thumbnail((_SIDE, _SIDE))
        scale = min(min(_WIDTH, room) / image.width, _HEIGHT / image.height)
        width = max(1, round(scale * image.width))
        figures.append(
            f'<figure style="width: {width}px">'
            f'<img alt="{html.escape(image.source)}" src="{png_url(small)}">'
            '<canvas aria-hidden="true"></canvas></figure>'
        )
    answer, at = "", 0
    for word in look.words:
        answer += html.escape(look.answer[at : word.start])
        answer += f'<button aria-pressed="false">{html.escape(word.text)}</button>'
        at = word.end
    # grids: rows and columns of each picture, and how far they reach over it (1: to its edge).
    # words: of each word and picture its heat from 0 to 99, row by row; null where it is not seen.
    data = {
        "grids": [[*grid, look.reach(number)] for number, grid in enumerate(look.grids)],
        "words": [
            [None if m is None else (99 * m).round().astype(int).ravel().tolist() for m in maps]
            for maps in map(look.heat, look.words)
        ],
    }
    page = Template(Path(__file__).with_name("look.html").read_text())
    return page.substitute(
        title=title,
        question=html.escape(question),
        pictures="".join(figures),
        answer=answer + html.escape(look.answer[at:]),
        caption=html.escape(CAPTION[0].upper() + CAPTION[1:]),
        model=html.escape(model),
        data=json.dumps(data, separators=(",", ":")),  # numbers and null alone
    )


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
        shares: Any = word.shares[image]  # which is seen, as it is lit
        rows.append((word.text, place, f"{shares[row, column]:.1%}"))
    return rows


def look_record(look: Look) -> dict[str, Any]:
    """The same as JSON: what --json and the server say.

    Sizes are (height, width) in pixels; heat is by rows, from 0 to 1; a picture that a word does
    not see is null. share: what of its reading the word gave to the picture's patches. source
    is left out where the pictures are.
    """
    sources = [{"source": image.source} for image in look.images] or [{} for _ in look.grids]
    pictures = zip(sources, look.grids, look.cells, strict=True)

    def told(word: Word) -> Iterator[dict[str, Any] | None]:
        for shares, heat in zip(word.shares, look.heat(word), strict=True):
            if shares is None or heat is None:
                yield None
                continue
            share, levels = float(shares.sum()), heat.astype(float).round(3)
            yield {"share": round(share, 4), "heat": levels.tolist()}

    return {
        "pictures": [
            {**source, "grid": list(grid), "cell": list(cell)} for source, grid, cell in pictures
        ],
        "words": [
            {"text": word.text, "start": word.start, "end": word.end, "pictures": [*told(word)]}
            for word in look.words
        ],
    }
