"""Where an answer looked as one web page: a word that is pointed at lights its places up.

The page loads nothing, so that it works offline and can be sent.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mmchat.explain.draw import CAPTION
from mmchat.explain.look import Look
from mmchat.images.png import png_url

_SIDE = 1024  # of a picture in the page, pixels
_WIDTH, _HEIGHT, _GAP = 640, 480, 16  # at most that it is shown in; between two
_COLUMN = 960  # of the page


def look_page(look: Look, question: str, model: str) -> str:
    """The page as text, with the pictures in it."""
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
    page = Template(Path(__file__).with_name("look.html").read_text())
    return page.substitute(
        title=title,
        question=html.escape(question),
        pictures="".join(figures),
        answer=answer + html.escape(look.answer[at:]),
        caption=html.escape(CAPTION[0].upper() + CAPTION[1:]),
        model=html.escape(model),
        data=json.dumps(_data(look), separators=(",", ":")),  # numbers and null alone
    )


def _data(look: Look) -> dict[str, Any]:
    """grids: rows and columns of each picture, and how far they reach over it (1: to its edge).
    words: of each word and picture its heat from 0 to 99, row by row; null where it is not seen."""
    maps = [look.heat(word) for word in look.words]
    return {
        "grids": [[*grid, look.reach(number)] for number, grid in enumerate(look.grids)],
        "words": [[None if m is None else _levels(m) for m in of_word] for of_word in maps],
    }


def _levels(heat: np.ndarray) -> list[int]:
    return (99 * heat).round().astype(int).ravel().tolist()
