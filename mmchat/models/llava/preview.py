"""Draws what the model sees of a picture: the square with its margin, or what is cut out."""

from __future__ import annotations

from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.image_processor import square_pixels
from mmchat.models.llava.squares import facts, square_of
from mmchat.models.preview import SQUARE, draw_square, hatched


def draw_preview(image: Image, config: LlavaConfig) -> PILImage.Image:
    """The square as the model gets it, its margin hatched, under a title."""
    told = facts(config, image.height, image.width)
    return draw_square(image.source, told, _square(image, config))


def _square(image: Image, config: LlavaConfig) -> PILImage.Image:
    """By way of the pixels that the model gets, so that the preview shows what detail is left."""
    seen = square_pixels(image.pixels, config).resize((SQUARE, SQUARE), PILImage.Resampling.BICUBIC)
    if config.image_processor.square == "crop":
        return seen
    height, width = square_of(config, image.height, image.width).resized
    scale = SQUARE / config.vision_config.image_size
    inner_h, inner_w = round(height * scale), round(width * scale)
    left, top = (SQUARE - inner_w) // 2, (SQUARE - inner_h) // 2
    ground = hatched(SQUARE, SQUARE)
    ground.paste(seen.crop((left, top, left + inner_w, top + inner_h)), (left, top))
    return ground
