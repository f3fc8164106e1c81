"""What people are told of pictures. Sizes are (height, width) in pixels."""

from __future__ import annotations

from mmchat.models.prompt import MediaFacts
from mmchat.models.qwen_vl.config import QwenVLConfig
from mmchat.words import pixels


def facts(config: QwenVLConfig, height: int, width: int) -> MediaFacts:
    """What people are told about a picture of `height` x `width` pixels."""
    vision = config.vision_config
    side, count = vision.image_size, vision.n_queries
    stretched = max(height, width) / min(height, width)
    return MediaFacts(
        size=(height, width),
        resized=(side, side),
        grid=(1, 1),
        tokens=count,
        positions=count + 2,  # with its two tags
        placed=f"resized to {pixels((side, side))}, whatever its shape",
        cut=f"{count + 2:,} positions",
        lines=(
            ("square", f"{pixels((side, side))}, the whole picture"),
            ("in the square", f"stretched: its sides were {stretched:.2f} to 1"),
        ),
        details={"square": [side, side], "fit": "stretch", "patch_size": vision.patch_size,
                 "positions": count + 2},
    )  # fmt: skip
