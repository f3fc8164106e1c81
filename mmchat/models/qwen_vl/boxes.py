"""Boxes in the text of answers: `<ref>the dog</ref><box>(517,508),(589,611)</box>`."""

from __future__ import annotations

import re

from mmchat.conversation import Box

SCALE = 1000  # of the numbers: thousandths of the picture's width and height
_POINT = r"\(\s*\d{1,4}\s*,\s*\d{1,4}\s*\)"
_REF = re.compile(r"<ref>([^<]*)</ref>\s*$")
_BOX = re.compile(
    rf"<box>\s*({_POINT}\s*,\s*{_POINT})\s*</box>|<quad>\s*({_POINT}(?:\s*,\s*{_POINT}){{3}})\s*</quad>"
)


def boxes_in(text: str) -> list[Box]:
    """All whole boxes, in their order; several behind one name are all called so."""
    boxes: list[Box] = []
    end, ref = 0, None
    for match in _BOX.finditer(text):
        between = text[end : match.start()]
        if named := _REF.search(between):
            ref = named[1].strip()
        elif between.strip():
            ref = None
        numbers = [min(int(number), SCALE) / SCALE for number in re.findall(r"\d+", match[0])]
        boxes.append(Box(ref, tuple(zip(numbers[::2], numbers[1::2], strict=True))))
        end = match.end()
    return boxes
