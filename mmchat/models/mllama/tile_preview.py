"""Draws how a picture lies on its canvas: what the model sees, tile by tile, and the padding."""

from __future__ import annotations

import math

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mmchat.conversation import Image
from mmchat.models.mllama.config import VisionConfig
from mmchat.models.mllama.tiling import TileLayout, layout_of
from mmchat.words import plural

Box = tuple[int, int, int, int]  # left, top, right, bottom

_LONG_SIDE = 1120  # of the drawn canvas, pixels
_MIN_WIDTH = 760
_MARGIN = 28
_TITLE_HEIGHT = 104
_SMOOTH = 2  # everything is drawn this much larger and then reduced

_PAPER = (247, 248, 250)
_BAR = (23, 32, 46)
_BAR_TEXT = (255, 255, 255)
_BAR_FAINT = (166, 180, 200)
_HATCH_GROUND = (226, 230, 236)
_HATCH_LINE = (180, 188, 200)
_ACCENT = (234, 88, 12)
_WHITE = (255, 255, 255)


def describe(layout: TileLayout, config: VisionConfig) -> tuple[str, str]:
    """The layout as two lines: sizes, then grid and tokens. Sizes are written width x height."""
    original, resized, canvas = map(_size, (layout.image_size, layout.resized, layout.canvas))
    fitted = "kept as it is" if layout.resized == layout.image_size else f"resized to {resized}"
    rows, columns = layout.aspect_ratio
    grid = f"{plural(rows, 'row')}, {plural(columns, 'column')}"
    padding = 1 - math.prod(layout.resized) / math.prod(layout.canvas)
    return (
        f"{original} pixels, {fitted}, on a canvas of {canvas}",
        f"{plural(layout.num_tiles, 'tile')} of {layout.tile_size} pixels ({grid}) · "
        f"{layout.num_tiles * config.tokens_per_tile:,} vision tokens · {padding:.0%} padding",
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def draw_tile_preview(image: Image, config: VisionConfig) -> PILImage.Image:
    """Draw the picture as the model gets it, with grid, tile numbers, hatched padding and a title.

    Tiles are numbered in the order in which the model reads them. Returns an RGB picture of about
    1,200 pixels on its longer side.
    """
    layout = layout_of(config, image.height, image.width)
    scale = _SMOOTH * _LONG_SIDE / max(layout.canvas)
    height, width = (round(side * scale) for side in layout.canvas)
    margin, title = _SMOOTH * _MARGIN, _SMOOTH * _TITLE_HEIGHT
    sheet_width = max(width + 2 * margin, _SMOOTH * _MIN_WIDTH)
    # An odd size would lose its last pixel when the sheet is reduced.
    size = [side + side % _SMOOTH for side in (sheet_width, title + height + 2 * margin)]
    sheet = PILImage.new("RGB", (size[0], size[1]), _PAPER)
    left, top = (sheet_width - width) // 2, title + margin
    inner = max(1, round(layout.resized[0] * scale)), max(1, round(layout.resized[1] * scale))
    sheet.paste(_canvas(image, layout, (height, width), inner), (left, top))
    draw = ImageDraw.Draw(sheet)
    _draw_title(draw, image.source, describe(layout, config), sheet_width)
    _draw_grid(draw, layout, (left, top, left + width, top + height))
    right_of = (left + inner[1], top, left + width, top + height)
    below = (left, top + inner[0], left + inner[1], top + height)
    _label_padding(draw, max(right_of, below, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])))
    return sheet.reduce(_SMOOTH)


def _canvas(
    image: Image, layout: TileLayout, size: tuple[int, int], inner: tuple[int, int]
) -> PILImage.Image:
    """The canvas, hatched where the picture does not cover it.

    size, inner: height and width of the drawn canvas and of the picture on it.
    """
    height, width = size
    canvas = PILImage.new("RGB", (width, height), _HATCH_GROUND)
    draw = ImageDraw.Draw(canvas)
    for start in range(-height, width, 14 * _SMOOTH):
        draw.line((start, height, start + height, 0), fill=_HATCH_LINE, width=2 * _SMOOTH)
    # By way of the size that the model gets, so that the preview shows what detail is left.
    seen = image.pixels.resize((layout.resized[1], layout.resized[0]), PILImage.Resampling.BILINEAR)
    canvas.paste(seen.resize((inner[1], inner[0]), PILImage.Resampling.BICUBIC), (0, 0))
    return canvas


def _label_padding(draw: ImageDraw.ImageDraw, strip: Box) -> None:
    """Write "padding" into the middle of the strip, if it fits."""
    font = _font(17)
    half_width = draw.textlength("padding", font=font) / 2 + 14 * _SMOOTH
    half_height = 16 * _SMOOTH
    if strip[2] - strip[0] < 3 * half_width or strip[3] - strip[1] < 3 * half_height:
        return
    x, y = (strip[0] + strip[2]) / 2, (strip[1] + strip[3]) / 2
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw.rounded_rectangle(box, radius=half_height, fill=_WHITE)
    draw.text((x, y), "padding", fill=_BAR, font=font, anchor="mm")


def _draw_title(draw: ImageDraw.ImageDraw, name: str, lines: tuple[str, str], width: int) -> None:
    """The dark bar with the name of the picture and its facts."""
    margin = _SMOOTH * _MARGIN
    draw.rectangle((0, 0, width + 1, _SMOOTH * _TITLE_HEIGHT), fill=_BAR)
    rows = (
        (name, 22, 26, _BAR_TEXT),
        (lines[0], 16, 56, _BAR_FAINT),
        (lines[1], 16, 80, _BAR_FAINT),
    )
    for text, size, y, colour in rows:
        font = _font(size)
        text = _shortened(draw, _one_line(text), font, width - 2 * margin)
        draw.text((margin, _SMOOTH * y), text, fill=colour, font=font, anchor="lm")


def _draw_grid(draw: ImageDraw.ImageDraw, layout: TileLayout, box: Box) -> None:
    """The lines between the tiles, the frame, and the number of each tile in its corner."""
    left, top, right, bottom = box
    rows, columns = layout.aspect_ratio
    xs = [left + round((right - left) * i / columns) for i in range(columns + 1)]
    ys = [top + round((bottom - top) * i / rows) for i in range(rows + 1)]
    for colour, thickness in ((_WHITE, 5), (_ACCENT, 2)):
        for x in xs[1:-1]:
            draw.line((x, top, x, bottom), fill=colour, width=thickness * _SMOOTH)
        for y in ys[1:-1]:
            draw.line((left, y, right, y), fill=colour, width=thickness * _SMOOTH)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=_ACCENT, width=2 * _SMOOTH)
    radius, font = 19 * _SMOOTH, _font(22)
    for number, (y, x) in enumerate(((y, x) for y in ys[:-1] for x in xs[:-1]), start=1):
        centre = x + radius + 10 * _SMOOTH, y + radius + 10 * _SMOOTH
        draw.circle(centre, radius, fill=_ACCENT, outline=_WHITE, width=2 * _SMOOTH)
        draw.text(centre, str(number), fill=_WHITE, font=font, anchor="mm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SMOOTH)


def _one_line(text: str) -> str:
    """Control characters would break the line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _shortened(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: float,
) -> str:
    """`text`, its middle replaced by dots if it is wider than `width` pixels."""
    text = text if len(text) <= 400 else f"{text[:200]}…{text[-200:]}"
    shown, kept = text, len(text)
    while kept > 2 and draw.textlength(shown, font=font) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown
