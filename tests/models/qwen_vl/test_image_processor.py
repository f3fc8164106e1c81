"""Pictures become squares bit for bit as Pillow-based processors of the same steps make them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmchat.catalog.known import find_spec
from mmchat.conversation import Image
from mmchat.models.qwen_vl.config import facts
from mmchat.models.qwen_vl.family import QwenVLFamily
from mmchat.models.qwen_vl.processor import preprocess
from tests.models.qwen_vl import oracle
from tests.models.qwen_vl.oracle import CONFIG

# Height, width: wide, tall, square, off by one, tiny, long.
SIZES = [
    (61, 90), (90, 61), (448, 448), (447, 449), (449, 447), (31, 200), (200, 31), (9, 1), (1, 9),
    (1, 1), (84, 84), (83, 85), (3, 200), (200, 3), (480, 640), (640, 480), (896, 896),
    (1000, 999), (2, 2), (7, 700), (700, 7), (1200, 300), (300, 1200), (335, 337),
]  # fmt: skip


def picture(height: int, width: int) -> Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(PILImage.fromarray(pixels), "x.png", f"{height} x {width}")


@pytest.mark.parametrize("side", [84, 448])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_transformers_bit_for_bit(size, side):
    image = picture(*size)
    square = {"height": side, "width": side}
    theirs = CLIPImageProcessorPil(size=square, do_center_crop=False)
    expected = theirs(image.pixels, return_tensors="np")["pixel_values"][0]
    [found] = preprocess(image, oracle.config(side)).tensors
    assert np.array_equal(found.numpy(), expected)


def test_facts_say_that_the_whole_picture_is_stretched():
    told = facts(CONFIG, 61, 122)
    assert (told.resized, told.grid) == ((84, 84), (1, 1))
    assert (told.tokens, told.positions) == (256, 258)
    assert dict(told.lines)["in the square"] == "stretched: its sides were 2.00 to 1"


def test_transparency_is_dropped_as_by_the_original_unless_asked_otherwise():
    spec = find_spec("qwenvl")
    assert spec is not None
    family = QwenVLFamily()
    assert family.alpha(spec.config, "hf") == "drop"
    assert family.alpha(family.with_alpha(spec.config, "white"), "hf") == "white"


def test_the_preview_is_the_square_under_a_title():
    drawn = QwenVLFamily().draw(CONFIG, picture(61, 90))
    assert drawn.size == (760, 832)
