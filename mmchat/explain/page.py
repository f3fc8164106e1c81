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


def look_page(look: Look, question: str, model: str) -> str:
    """The page as text, with the pictures in it."""
    title = html.escape(look.answer.strip()[:80])
    figures = []
    for image in look.images:
        small = image.pixels.copy()
        small.thumbnail((_SIDE, _SIDE))
        figures.append(
            f'<figure><img alt="{html.escape(image.source)}" src="{png_url(small)}">'
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
    grids = []
    for number, image in enumerate(look.images):
        rows, columns = look.grids[number]
        height, width = look.cells[number]
        grids.append([rows, columns, [rows * height / image.height, columns * width / image.width]])
    return {
        "grids": grids,
        "words": [[None if m is None else _levels(m) for m in of_word] for of_word in maps],
    }


def _levels(heat: np.ndarray) -> list[int]:
    return (99 * heat).round().astype(int).ravel().tolist()
