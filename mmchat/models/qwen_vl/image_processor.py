"""Picture to a normalised square, bit for bit as the original code with Pillow.

The whole picture is resized to the square by Pillow's bicubic filter, whatever its shape.
"""

from __future__ import annotations

from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.models.prepared import SquareImage, normalised
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.models.qwen_vl.squares import facts


def preprocess(image: Image, config: QwenVLConfig) -> SquareImage:
    """RGB pixels -> [C, S, S] float32."""
    levels = config.image_processor
    pixels = normalised(square_pixels(image, config), levels.image_mean, levels.image_std)
    told = facts(config, image.height, image.width)
    return SquareImage(image.content_hash, told, (pixels,))


def square_pixels(image: Image, config: QwenVLConfig) -> PILImage.Image:
    """What the encoder sees: S x S pixels."""
    side = config.vision_config.image_size
    return image.pixels.resize((side, side), PILImage.Resampling.BICUBIC)
