"""How a picture becomes the square that the encoder sees. Sizes are (height, width) in pixels."""

from __future__ import annotations

from dataclasses import dataclass

from mmchat.models.llava.config import LlavaConfig
from mmchat.models.prompt import MediaFacts
from mmchat.words import pixels

# A picture that is longer is cut to this many times its shorter side before it is resized: of what
# is cut off the model would see nothing, and resized it would have millions of pixels.
_LONGEST = 100


@dataclass(frozen=True)
class Square:
    """source: (left, top, right, bottom), what is resized of the picture. resized: its size then;
    "pad" has a margin around it, "crop" shows the middle of it."""

    source: tuple[int, int, int, int]
    resized: tuple[int, int]


def square_of(config: LlavaConfig, height: int, width: int) -> Square:
    side, whole = config.vision_config.image_size, (0, 0, width, height)
    if config.image_processor.square == "pad":
        longer = max(height, width)
        resized = max(1, round(side * height / longer)), max(1, round(side * width / longer))
        return Square(whole, resized)
    shorter = min(height, width)
    seen_h, seen_w = min(height, _LONGEST * shorter), min(width, _LONGEST * shorter)
    left, top = (width - seen_w) // 2, (height - seen_h) // 2
    # transformers' order of operations, in which the shorter side comes out as `side`
    resized = int(side * seen_h / shorter), int(side * seen_w / shorter)
    return Square((left, top, left + seen_w, top + seen_h), resized)


def facts(config: LlavaConfig, height: int, width: int) -> MediaFacts:
    """What people are told about a picture of `height` x `width` pixels."""
    side, count = config.vision_config.image_size, config.positions_per_image
    square = square_of(config, height, width)
    size, resized = pixels((side, side)), pixels(square.resized)
    if config.image_processor.square == "pad":
        margin = 1 - square.resized[0] * square.resized[1] / side**2
        placed = f"{resized} on a square of {size}"
        line = f"{size}, {margin:.0%} margin in the mean colour"
        within = f"{resized} in the middle"
    else:
        hidden = 1 - min(height, width) / max(height, width)
        placed = f"the middle {size} of {resized}"
        line = f"{size}, cut out of the middle"
        within = f"resized to {resized}, {hidden:.0%} of it not seen"
    return MediaFacts(
        size=(height, width),
        resized=square.resized,
        grid=(1, 1),
        tokens=count,
        positions=count,
        placed=placed,
        cut=f"{count:,} positions",
        lines=(("square", line), ("in the square", within)),
        details={
            "square": [side, side],
            "fit": config.image_processor.square,
            "patch_size": config.vision_config.patch_size,
            "positions": count,
        },
    )
