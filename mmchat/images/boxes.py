"""Places in a picture that an answer names: in its pixels, and drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmchat.conversation import Box, Image

if TYPE_CHECKING:
    from PIL.Image import Image as Drawing

# Far apart, and seen on light and dark ground.
_COLOURS = ("#ff3b30", "#0a84ff", "#34c759", "#ff9f0a", "#bf5af2", "#00c7be", "#ffd60a", "#ff2d92")
_INK = "#ffffff"


def in_pixels(box: Box, image: Image) -> list[tuple[int, int]]:
    """Its corners (x, y), rounded down."""
    return [(int(x * image.width), int(y * image.height)) for x, y in box.points]


def box_records(boxes: Sequence[Box], image: Image) -> list[dict[str, Any]]:
    """What --json says of them: `box` is [left, top, right, bottom], `quad` four corners."""
    records = []
    for box in boxes:
        corners = [number for corner in in_pixels(box, image) for number in corner]
        kind = "box" if len(box.points) == 2 else "quad"
        records.append({"ref": box.ref, kind: corners, "picture": image.source})
    return records


def draw_boxes(boxes: Sequence[Box], image: Image) -> Drawing:
    """A copy of the picture with the boxes on it; those of one name in one colour."""
    from PIL import ImageDraw, ImageFont

    drawing = image.pixels.copy()
    draw = ImageDraw.Draw(drawing)
    longer = max(drawing.size)
    width, font = max(2, longer // 300), ImageFont.load_default(max(12, longer // 45))
    names = list(dict.fromkeys(box.ref for box in boxes))
    for box in boxes:
        colour = _COLOURS[names.index(box.ref) % len(_COLOURS)]
        corners = in_pixels(box, image)
        if len(corners) == 2:
            (left, top), (right, bottom) = corners
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        draw.line([*corners, corners[0]], fill=colour, width=width, joint="curve")
        if box.ref:
            name = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}"
                           for char in box.ref[:80])  # fmt: skip
            place = corners[0]
            draw.rectangle(draw.textbbox(place, name, font=font), fill=colour)
            draw.text(place, name, fill=_INK, font=font)
    return drawing
