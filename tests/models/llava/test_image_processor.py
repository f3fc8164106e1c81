"""Pictures become squares bit for bit as transformers' PIL processors make them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmchat.conversation import Image
from mmchat.models.llava import image_processor
from mmchat.models.llava.config import LlavaConfig
from mmchat.models.llava.family import LlavaFamily
from mmchat.models.llava.image_processor import mean_colour, preprocess, square_pixels
from mmchat.models.llava.squares import facts, square_of
from mmchat.models.preview import HATCH_LINE
from tests.models.llava.oracle import CONFIG
from tests.models.llava.original import SIZES, noise

REAL = replace(CONFIG, vision_config=replace(CONFIG.vision_config, image_size=336))
CROP = replace(CONFIG, image_processor=replace(CONFIG.image_processor, square="crop"))
REAL_CROP = replace(REAL, image_processor=CROP.image_processor)


def picture(height: int, width: int, seed: int = 0) -> Image:
    pixels = noise(height, width, seed)
    return Image(PILImage.fromarray(pixels), "x.png", f"{height} x {width}")


def theirs(config: LlavaConfig):
    side = config.vision_config.image_size
    size: Any = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if config.image_processor.square == "pad":
        return LlavaImageProcessorPil(do_pad=True, **size)
    return CLIPImageProcessorPil(**size)


@pytest.mark.parametrize("config", [CONFIG, CROP, REAL, REAL_CROP])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_transformers_bit_for_bit(size, config):
    image = picture(*size)
    expected = theirs(config)(image.pixels, return_tensors="np")["pixel_values"][0]
    [found] = preprocess(image, config).tensors
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("size", [(61, 90), (90, 61), (3, 200), (200, 3)])
def test_a_square_made_in_strips_is_the_one_that_is_made_whole(size, monkeypatch):
    whole = np.asarray(square_pixels(picture(*size).pixels, CONFIG))
    monkeypatch.setattr(image_processor, "_STRIP_PIXELS", 450)
    assert np.array_equal(np.asarray(square_pixels(picture(*size).pixels, CONFIG)), whole)


@pytest.mark.parametrize("size", [(900, 20), (2000, 700), (700, 3)])
def test_where_the_margin_is_not_computed_levels_are_the_same_or_the_next(size, monkeypatch):
    image = picture(*size).pixels
    whole = np.asarray(square_pixels(image, REAL)).astype(int)
    monkeypatch.setattr(image_processor, "_EXACT_PIXELS", 0)
    found = np.asarray(square_pixels(image, REAL)).astype(int)
    assert abs(found - whole).max() <= 1
    assert (found != whole).mean() < 1e-3


def test_the_margin_has_the_mean_colour_of_the_original():
    assert mean_colour(CONFIG.image_processor) == (122, 116, 104)
    seen = np.asarray(square_pixels(PILImage.new("RGB", (70, 10), (255, 0, 0)), CONFIG))
    assert seen[0, 0].tolist() == [122, 116, 104]
    assert seen[35, 35].tolist() == [255, 0, 0]


@pytest.mark.parametrize("config", [CONFIG, CROP])
@pytest.mark.parametrize("size", [(1, 65_535), (30_000, 1), (20, 60_000)])
def test_a_thread_of_a_picture_takes_little_memory(size, config):
    """Padded whole it would have 4 billion pixels, resized by its shorter side millions."""
    image = PILImage.new("RGB", size[::-1], (9, 9, 9))
    tracemalloc.start()
    seen = square_pixels(image, config)
    tracemalloc.stop()
    assert seen.size == (70, 70)
    square = square_of(config, *size)
    assert max(square.resized) <= 7_000


def test_facts_say_how_the_picture_lies_in_its_square():
    padded, cut = facts(REAL, 480, 640), facts(REAL_CROP, 480, 640)
    assert (padded.resized, cut.resized) == ((252, 336), (336, 448))
    assert padded.grid == (1, 1)
    assert (padded.tokens, padded.positions) == (576, 576)
    assert padded.placed == "336 x 252 px on a square of 336 x 336 px"
    assert cut.placed == "the middle 336 x 336 px of 448 x 336 px"
    assert dict(padded.lines)["square"] == "336 x 336 px, 25% margin in the mean colour"
    assert dict(cut.lines)["in the square"] == "resized to 448 x 336 px, 25% of it not seen"


def test_the_preview_shows_the_margin_and_a_crop_has_none():
    wide = picture(30, 90)
    padded, cut = (np.asarray(LlavaFamily().draw(config, wide)) for config in (REAL, REAL_CROP))
    assert padded.shape == cut.shape
    near = lambda drawn: (abs(drawn.astype(int) - HATCH_LINE).max(-1) < 4).sum()  # noqa: E731
    assert near(padded) > 1_000
    assert near(cut) < 300
