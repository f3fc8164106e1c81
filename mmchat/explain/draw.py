"""Draws where an answer looked, as one picture: a place lights up as far as it was read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from mmchat.conversation import Image
from mmchat.explain.look import Look, Word
from mmchat.models.preview import MARGIN, MIN_WIDTH, PAPER, SMOOTH, TITLE_HEIGHT, draw_title, font

_DARK, _GLOW = 0.25, np.array((255, 150, 40), dtype=np.float32)
_INK = (23, 32, 46)
_LONG_SIDE, _SMALL_SIDE = 760, 300  # of a picture that stands alone, and among others; pixels
_LABEL = 34
MOST_WORDS = 24  # that are drawn, each with its pictures
CAPTION = "brighter where cross-attention read more: where it looked, not why it said so"


def lit(image: Image, heat: np.ndarray | None, cell: tuple[float, float]) -> PILImage.Image:
    """The picture in the dark but for where it was read; all dark where it was not seen.

    heat: [rows, columns] from 0 to 1, of cells of that height and width.
    """
    pixels = np.asarray(image.pixels, dtype=np.float32)
    light = np.zeros((image.height, image.width, 1), dtype=np.float32)
    if heat is not None:
        rows, columns = heat.shape
        size = round(columns * cell[1]), round(rows * cell[0])  # the last cells reach over the edge
        smooth = PILImage.fromarray(heat.astype(np.float32)).resize(
            size, PILImage.Resampling.BICUBIC
        )
        light[:] = np.clip(np.asarray(smooth)[: image.height, : image.width, None], 0, 1)
    shown = pixels * (_DARK + (1 - _DARK) * light)
    shown += 0.35 * light * (_GLOW - shown)
    return PILImage.fromarray(shown.round().astype(np.uint8))


def draw_look(look: Look, word: Word | None = None) -> PILImage.Image:
    """The pictures as `word` read them; without one, as the answer and each of its words did."""
    if word:
        shown = [(word.text, look.heat(word))]
    else:
        shown = [("the answer", look.overall())]
        shown += [(each.text, look.heat(each)) for each in look.words[:MOST_WORDS]]
    side = SMOOTH * (_LONG_SIDE if len(shown) == 1 else _SMALL_SIDE)
    cells = [_labelled(text, _row(look, maps, side)) for text, maps in shown]
    return _sheet(look, cells)


def _row(look: Look, maps: Sequence[np.ndarray | None], side: int) -> PILImage.Image:
    """The pictures beside each other, none longer than `side`."""
    drawn = []
    for image, heat, cell in zip(look.images, maps, look.cells, strict=True):
        picture = lit(image, heat, cell)
        scale = side / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        drawn.append(picture.resize(size, PILImage.Resampling.BICUBIC))
    gap = SMOOTH * 8
    width = sum(picture.width for picture in drawn) + gap * (len(drawn) - 1)
    row = PILImage.new("RGB", (width, max(picture.height for picture in drawn)), PAPER)
    left = 0
    for picture in drawn:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def _labelled(text: str, picture: PILImage.Image) -> PILImage.Image:
    label = SMOOTH * _LABEL
    cell = PILImage.new("RGB", (picture.width, picture.height + label), PAPER)
    cell.paste(picture, (0, label))
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    ImageDraw.Draw(cell).text((0, label // 2), shown, fill=_INK, font=font(18), anchor="lm")
    return cell


def _sheet(look: Look, cells: Sequence[PILImage.Image]) -> PILImage.Image:
    """The cells row by row under the dark bar with the answer."""
    margin, title = SMOOTH * MARGIN, SMOOTH * TITLE_HEIGHT
    widest = max(cell.width for cell in cells)
    columns = max(1, min(len(cells), (SMOOTH * 2 * MIN_WIDTH) // (widest + margin)))
    rows = [cells[at : at + columns] for at in range(0, len(cells), columns)]
    width = max(SMOOTH * MIN_WIDTH, columns * (widest + margin) + margin)
    height = title + margin + sum(max(c.height for c in row) + margin for row in rows)
    size = [side + side % SMOOTH for side in (width, height)]
    sheet = PILImage.new("RGB", (size[0], size[1]), PAPER)
    names = ", ".join(image.source for image in look.images)
    draw_title(ImageDraw.Draw(sheet), look.answer.strip(), (names, CAPTION), size[0])
    top = title + margin
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (margin + column * (widest + margin), top))
        top += max(cell.height for cell in row) + margin
    return sheet.reduce(SMOOTH)
