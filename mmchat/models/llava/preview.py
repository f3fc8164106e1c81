"""Draws what the model sees of a picture: the square with its margin, or what is cut out."""

from __future__ import annotations

from PIL import Image as PILImage
from PIL import ImageDraw

from mmchat.conversation import Image
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.image_processor import square_pixels
from mmchat.models.llava.squares import facts, square_of
from mmchat.models.preview import (
    ACCENT,
    MARGIN,
    MIN_WIDTH,
    PAPER,
    SMOOTH,
    TITLE_HEIGHT,
    draw_title,
    hatched,
)
from mmchat.words import pixels

_SIDE = 672  # of the drawn square, pixels


def draw_preview(image: Image, config: LlavaConfig) -> PILImage.Image:
    """The square as the model gets it, its margin hatched, under a title.

    Returns an RGB picture of about 800 pixels on its longer side.
    """
    side, margin, title = (SMOOTH * size for size in (_SIDE, MARGIN, TITLE_HEIGHT))
    width = max(side + 2 * margin, SMOOTH * MIN_WIDTH)
    sheet = PILImage.new("RGB", (width, title + side + 2 * margin), PAPER)
    left, top = (width - side) // 2, title + margin
    sheet.paste(_square(image, config, side), (left, top))
    draw = ImageDraw.Draw(sheet)
    told = facts(config, image.height, image.width)
    line = f"{pixels(told.size)}, {told.placed}"
    draw_title(draw, image.source, (line, f"{told.tokens:,} vision tokens"), width)
    draw.rectangle((left, top, left + side - 1, top + side - 1), outline=ACCENT, width=2 * SMOOTH)
    return sheet.reduce(SMOOTH)


def _square(image: Image, config: LlavaConfig, side: int) -> PILImage.Image:
    """By way of the pixels that the model gets, so that the preview shows what detail is left."""
    seen = square_pixels(image.pixels, config).resize((side, side), PILImage.Resampling.BICUBIC)
    if config.image_processor.square == "crop":
        return seen
    height, width = square_of(config, image.height, image.width).resized
    scale = side / config.vision_config.image_size
    inner_h, inner_w = round(height * scale), round(width * scale)
    left, top = (side - inner_w) // 2, (side - inner_h) // 2
    ground = hatched(side, side)
    ground.paste(seen.crop((left, top, left + inner_w, top + inner_h)), (left, top))
    return ground
