import math

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw

from mmchat.images import from_pil
from mmchat.models.mllama import tile_preview
from mmchat.models.mllama.config import VisionConfig
from mmchat.models.mllama.tile_preview import describe, draw_tile_preview
from mmchat.models.mllama.tiling import choose_layout
from mmchat.models.preview import HATCH_GROUND, HATCH_LINE, font, shortened


def vision_config(side: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        num_channels=3,
        image_size=side,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=(0, 1),
        norm_eps=1e-5,
    )


def preview(height: int, width: int, side: int = 560, colour=(0, 0, 255), name="dog.png"):
    image = from_pil(PILImage.new("RGB", (width, height), colour), source=name)
    layout = choose_layout(height, width, side, 4)
    return draw_tile_preview(image, vision_config(side)), layout


def test_the_description_reads_well():
    assert describe(preview(300, 1000)[1], vision_config(560)) == (
        "1000 x 300 px, on a canvas of 1120 x 560 px, 2 tiles (1 row, 2 columns)",
        "1000 x 300 px at the top left, 52% padding · 3,202 vision tokens",
    )
    assert describe(preview(60, 90, 112)[1], vision_config(112)) == (
        "90 x 60 px, on a canvas of 112 x 112 px, 1 tile",
        "112 x 74 px at the top left, 34% padding · 65 vision tokens",
    )


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ((420, 1900), 560),
        ((900, 300), 560),
        ((700, 800), 448),
        ((1, 1), 112),
        ((1, 65535), 560),
        ((65535, 1), 112),
        ((5000, 500), 560),
    ],
)
def test_blue_covers_what_the_picture_covers(size, side):
    drawn, layout = preview(*size, side)
    canvas_h, canvas_w = layout.canvas
    scale = 1120 / max(layout.canvas)
    assert drawn.mode == "RGB"
    assert drawn.width == max(round(canvas_w * scale) + 56, 760)
    assert drawn.height == round(canvas_h * scale) + 104 + 56
    blue = (np.asarray(drawn) == (0, 0, 255)).all(-1)
    expected = layout.resized[0] * layout.resized[1] * scale**2
    # Lines, numbers and the edge of thin pictures cover a part of it.
    assert expected * 0.85 - 12_000 < blue.sum() <= expected * 1.02
    if math.prod(layout.resized) < 0.95 * math.prod(layout.canvas):
        assert (np.asarray(drawn) == HATCH_GROUND).all(-1).sum() > 1000


def test_each_tile_has_its_number_in_its_corner(monkeypatch):
    written = []
    real = tile_preview.ImageDraw.ImageDraw.text

    def text(self, xy, text, **options):
        written.append((text, xy))
        return real(self, xy, text, **options)

    monkeypatch.setattr(tile_preview.ImageDraw.ImageDraw, "text", text)
    preview(1100, 1100)
    numbers = {text: xy for text, xy in written if text.isdigit()}
    assert list(numbers) == ["1", "2", "3", "4"]
    assert numbers["1"][1] == numbers["2"][1] < numbers["3"][1] == numbers["4"][1]
    assert numbers["1"][0] == numbers["3"][0] < numbers["2"][0] == numbers["4"][0]
    assert "dog.png" in [text for text, _ in written]


def test_a_full_canvas_has_no_hatching():
    drawn, layout = preview(560, 1120)
    assert layout.resized == layout.canvas
    assert not (np.asarray(drawn) == HATCH_LINE).all(-1).any()


@pytest.mark.parametrize("name", ["x" * 5000, "a\nb\x1b[31m\0", "\u72ac.png", ""])
def test_any_name_can_be_drawn(name):
    assert preview(60, 90, 112, name=name)[0].width == 1176


@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "photo of a dog.png", "WiM" * 100])
@pytest.mark.parametrize("width", [0, 40, 120, 500])
def test_a_name_loses_no_more_of_its_middle_than_it_must(text, width):
    draw, letters = ImageDraw.Draw(PILImage.new("RGB", (1, 1))), font(16)
    ways = [f"{text[:half]}…{text[-half:]}" for half in range(1, (len(text) + 1) // 2)]
    fitting = [way for way in [*ways, text] if draw.textlength(way, font=letters) <= width]
    expected = fitting[-1] if fitting else [*ways, text][0]
    assert shortened(draw, text, letters, width) == expected
