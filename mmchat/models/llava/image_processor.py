"""Picture to a normalised square, bit for bit as the original code and the Hub's PIL processors.

"pad" puts the picture into the middle of a square of the mean colour and then resizes, "crop"
resizes its shorter side and cuts out the middle; both by Pillow's bicubic filter.
"""

from __future__ import annotations

import math

from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.models.llava.config import ImageProcessorConfig, LlavaConfig
from mmchat.models.llava.squares import facts, square_of
from mmchat.models.prepared import PreparedImage, normalised
from mmchat.models.preview import SQUARE, hatched

_BICUBIC = PILImage.Resampling.BICUBIC
_SUPPORT = 2.0  # of the filter to each side, in pixels of the result
_STRIP_PIXELS = 2**22  # of a padded square that are held at once
_EXACT_PIXELS = 2**27  # of a padded square, beyond which its margin is not computed: it takes long


def preprocess(image: Image, config: LlavaConfig) -> PreparedImage:
    """RGB pixels -> [C, S, S] float32."""
    told = facts(config, image.height, image.width)
    values = normalised(square_pixels(image.pixels, config), config.image_processor)
    return PreparedImage(image.content_hash, told, (values,))


def square_pixels(picture: PILImage.Image, config: LlavaConfig) -> PILImage.Image:
    """What the encoder sees of an RGB picture: S x S pixels."""
    side = config.vision_config.image_size
    if config.image_processor.square == "pad":
        return _padded(picture, side, mean_colour(config.image_processor))
    square = square_of(config, picture.height, picture.width)
    left, top, right, bottom = square.source
    if (right - left, bottom - top) != picture.size:  # extreme: only the middle of it is resized
        picture = picture.crop(square.source)
    height, width = square.resized
    picture = picture.resize((width, height), _BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def mean_colour(config: ImageProcessorConfig) -> tuple[int, int, int]:
    """Of the margin: (red, green, blue), rounded down as the original does it."""
    red, green, blue = (int(255 * mean) for mean in config.image_mean)
    return red, green, blue


def _padded(picture: PILImage.Image, side: int, colour: tuple[int, int, int]) -> PILImage.Image:
    """The square with its margin, resized.

    Pillow resizes the rows and then the columns. Done in these two steps by hand, the square of a
    long thin picture, which may have billions of pixels, is never whole in memory.
    """
    longer = max(picture.size)
    if picture.size == (longer, longer):
        return picture.resize((side, side), _BICUBIC)
    left, top = (longer - picture.width) // 2, (longer - picture.height) // 2
    columns = (0, side)
    if longer * picture.height > _EXACT_PIXELS:
        columns = _columns_of(left, left + picture.width, longer, side)
    scale = longer / side
    begin, end = (column * scale for column in columns)
    first, last = 0, longer  # of the square's columns, those that are looked at
    if columns != (0, side):
        first = max(0, math.floor(begin - _SUPPORT * scale) - 1)
        last = min(longer, math.ceil(end + _SUPPORT * scale) + 1)
    narrow = PILImage.new("RGB", (side, longer), colour)
    count = max(1, _STRIP_PIXELS // (last - first))
    for row in range(0, picture.height, count):
        rows = picture.crop((0, row, picture.width, min(row + count, picture.height)))
        strip = PILImage.new("RGB", (last - first, rows.height), colour)
        strip.paste(rows, (left - first, 0))
        size, box = (columns[1] - columns[0], rows.height), (begin - first, 0, end - first)
        narrow.paste(strip.resize(size, _BICUBIC, (*box, rows.height)), (columns[0], top + row))
    return narrow.resize((side, side), _BICUBIC)


def _columns_of(left: int, right: int, longer: int, side: int) -> tuple[int, int]:
    """The columns of the resized square that depend on columns left .. right of the large one.

    All others have the colour of the margin. Pillow takes the edges of a part in float32, so that
    a level may come out as the next one.
    """
    scale = longer / side
    first = math.floor(left / scale - _SUPPORT) - 1
    return max(0, first), min(side, math.ceil(right / scale + _SUPPORT) + 1)


def drawn_square(image: Image, config: LlavaConfig) -> PILImage.Image:
    """The square as the model gets it, its margin hatched, for a preview of SQUARE pixels.

    By way of the pixels that the model gets, so that it shows what detail is left.
    """
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
