"""Draws how a picture lies on its canvas: what the model sees, tile by tile, and the padding."""

from __future__ import annotations

from PIL import Image as PILImage
from PIL import ImageDraw

from mmchat.conversation import Image
from mmchat.models.mllama.config import VisionConfig
from mmchat.models.mllama.tiling import TileLayout, layout_facts, layout_of
from mmchat.models.preview import ACCENT, BAR, SMOOTH, WHITE, font, hatched, on_sheet
from mmchat.words import pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom

_LONG_SIDE = 1120  # of the drawn canvas, pixels


def describe(layout: TileLayout, config: VisionConfig) -> tuple[str, str]:
    """The layout as two lines: sizes and grid, then the place of the picture and tokens."""
    told = layout_facts(layout, config)
    (_, canvas), (_, placed) = told.lines
    return (
        f"{pixels(told.size)}, on a canvas of {canvas}",
        f"{placed} · {told.tokens:,} vision tokens",
    )


def draw_tile_preview(image: Image, config: VisionConfig) -> PILImage.Image:
    """Draw the picture as the model gets it, with grid, tile numbers, hatched padding and a title.

    Tiles are numbered in the order in which the model reads them. Returns an RGB picture of about
    1,200 pixels on its longer side.
    """
    layout = layout_of(config, image.height, image.width)
    scale = SMOOTH * _LONG_SIDE / max(layout.canvas)
    height, width = (round(side * scale) for side in layout.canvas)
    drawing = hatched(height, width)
    inner = max(1, round(layout.resized[0] * scale)), max(1, round(layout.resized[1] * scale))
    # By way of the size that the model gets, so that the preview shows what detail is left.
    seen = image.pixels.resize((layout.resized[1], layout.resized[0]), PILImage.Resampling.BILINEAR)
    drawing.paste(seen.resize((inner[1], inner[0]), PILImage.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(drawing)
    _draw_grid(draw, layout, width, height)
    right_of, below = (inner[1], 0, width, height), (0, inner[0], width, height)
    _label_padding(draw, max(right_of, below, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])))
    return on_sheet(image.source, describe(layout, config), drawing)


def _label_padding(draw: ImageDraw.ImageDraw, strip: Box) -> None:
    """Write "padding" into the middle of the strip, if it fits."""
    label = font(17)
    half_width = draw.textlength("padding", font=label) / 2 + 14 * SMOOTH
    half_height = 16 * SMOOTH
    if strip[2] - strip[0] < 3 * half_width or strip[3] - strip[1] < 3 * half_height:
        return
    x, y = (strip[0] + strip[2]) / 2, (strip[1] + strip[3]) / 2
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw.rounded_rectangle(box, radius=half_height, fill=WHITE)
    draw.text((x, y), "padding", fill=BAR, font=label, anchor="mm")


def _draw_grid(draw: ImageDraw.ImageDraw, layout: TileLayout, width: int, height: int) -> None:
    """The lines between the tiles, and the number of each tile in its corner."""
    rows, columns = layout.aspect_ratio
    xs = [round(width * i / columns) for i in range(columns + 1)]
    ys = [round(height * i / rows) for i in range(rows + 1)]
    for colour, thickness in ((WHITE, 5), (ACCENT, 2)):
        for x in xs[1:-1]:
            draw.line((x, 0, x, height), fill=colour, width=thickness * SMOOTH)
        for y in ys[1:-1]:
            draw.line((0, y, width, y), fill=colour, width=thickness * SMOOTH)
    radius, label = 19 * SMOOTH, font(22)
    for number, (y, x) in enumerate(((y, x) for y in ys[:-1] for x in xs[:-1]), start=1):
        centre = x + radius + 10 * SMOOTH, y + radius + 10 * SMOOTH
        draw.circle(centre, radius, fill=ACCENT, outline=WHITE, width=2 * SMOOTH)
        draw.text(centre, str(number), fill=WHITE, font=label, anchor="mm")
