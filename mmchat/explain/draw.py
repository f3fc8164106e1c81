"""Draws where an answer looked, as one picture: a place lights up as far as it was read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from mmchat.conversation import Image
from mmchat.explain.look import Look, Word
from mmchat.models.preview import (
    MARGIN,
    MIN_WIDTH,
    PAPER,
    SMOOTH,
    TITLE_HEIGHT,
    draw_title,
    font,
    one_line,
    shortened,
)

_DARK, _GLOW = 0.25, np.array((255, 150, 40), dtype=np.float32)
_INK = (23, 32, 46)
_LONG_SIDE, _SMALL_SIDE = 760, 300  # of what stands alone, and of each of several words; pixels
_LEAST_SIDE = 96  # of each of many pictures that stand beside each other
_GAP = 8
_LABEL, _LABEL_WIDTH = 34, 140
MOST_WORDS = 24  # that are drawn, each with its pictures
CAPTION = "brighter where cross-attention read more: where it looked, not why it said so"


def lit(
    picture: PILImage.Image, heat: np.ndarray | None, reach: tuple[float, float] = (1, 1)
) -> PILImage.Image:
    """The RGB picture in the dark but for where it was read; all dark where it was not seen.

    heat: [rows, columns] from 0 to 1. reach: how far they go down and right, 1 for to the edge.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    light = np.zeros((picture.height, picture.width, 1), dtype=np.float32)
    if heat is not None:
        size = round(picture.width * reach[1]), round(picture.height * reach[0])
        smooth = PILImage.fromarray(heat.astype(np.float32)).resize(
            size, PILImage.Resampling.BICUBIC
        )
        light[:] = np.clip(np.asarray(smooth)[: picture.height, : picture.width, None], 0, 1)
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
    side, room = (_LONG_SIDE, 2 * MIN_WIDTH) if word else (_SMALL_SIDE, MIN_WIDTH - 2 * MARGIN)
    side = min(side, max(_LEAST_SIDE, room // len(look.images) - _GAP))
    pictures = [_scaled(image, SMOOTH * side) for image in look.images]
    cells = [_labelled(text, _row(look, pictures, maps)) for text, maps in shown]
    return _sheet(look, cells, None if word else len(look.words))


def draw_row(look: Look, word: Word | None = None) -> PILImage.Image:
    """The pictures alone beside each other, as `word` or the whole answer read them."""
    maps = look.heat(word) if word else look.overall()
    return _row(look, [_scaled(image, _SMALL_SIDE) for image in look.images], maps)


def _scaled(image: Image, side: int) -> PILImage.Image:
    """With a longer side of `side`."""
    scale = side / max(image.height, image.width)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.pixels.resize(size, PILImage.Resampling.BICUBIC, reducing_gap=2)


def _row(
    look: Look, pictures: Sequence[PILImage.Image], maps: Sequence[np.ndarray | None]
) -> PILImage.Image:
    """The pictures beside each other, lit."""
    gap = SMOOTH * _GAP
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = PILImage.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for number, (picture, heat) in enumerate(zip(pictures, maps, strict=True)):
        row.paste(lit(picture, heat, look.reach(number)), (left, 0))
        left += picture.width + gap
    return row


def _labelled(text: str, picture: PILImage.Image) -> PILImage.Image:
    label = SMOOTH * _LABEL
    width = max(picture.width, SMOOTH * _LABEL_WIDTH)
    cell = PILImage.new("RGB", (width, picture.height + label), PAPER)
    cell.paste(picture, (0, label))
    draw, chosen = ImageDraw.Draw(cell), font(18)
    shown = shortened(draw, one_line(text), chosen, width)
    draw.text((0, label // 2), shown, fill=_INK, font=chosen, anchor="lm")
    return cell


def _sheet(look: Look, cells: Sequence[PILImage.Image], words: int | None) -> PILImage.Image:
    """The cells row by row under the dark bar with the answer; words: how many it has."""
    margin, title = SMOOTH * MARGIN, SMOOTH * TITLE_HEIGHT
    widest = max(cell.width for cell in cells)
    columns = max(1, min(len(cells), (SMOOTH * 2 * MIN_WIDTH) // (widest + margin)))
    rows = [cells[at : at + columns] for at in range(0, len(cells), columns)]
    width = max(SMOOTH * MIN_WIDTH, columns * (widest + margin) + margin)
    height = title + margin + sum(max(c.height for c in row) + margin for row in rows)
    size = [side + side % SMOOTH for side in (width, height)]
    sheet = PILImage.new("RGB", (size[0], size[1]), PAPER)
    names = ", ".join(image.source for image in look.images)
    cut = f"the first {MOST_WORDS} of {words} words; " if words and words > MOST_WORDS else ""
    draw_title(ImageDraw.Draw(sheet), look.answer.strip(), (names, cut + CAPTION), size[0])
    top = title + margin
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (margin + column * (widest + margin), top))
        top += max(cell.height for cell in row) + margin
    return sheet.reduce(SMOOTH)
