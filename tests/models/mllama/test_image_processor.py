import math
import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.images import from_pil
from mmchat.models.mllama.config import ImageProcessorConfig
from mmchat.models.mllama.processor import preprocess

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG = ImageProcessorConfig(MEAN, STD, "white")


@cache
def hub_processor(side: int, tiles: int = 4) -> Any:
    # takes seconds to import, which those who run other tests need not wait for
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    return MllamaImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
        max_image_tiles=tiles,
    )


@cache
def scenery(side: int) -> np.ndarray:
    """Noise on slopes, so that both fine detail and rounding of smooth areas are compared."""
    rng = np.random.default_rng(11)
    slope = np.linspace(0, 255, side, dtype=np.float32)
    smooth = np.stack(np.broadcast_arrays(slope[:, None], slope[None], slope[::-1, None]), -1)
    noise = rng.integers(-40, 41, (side, side, 3), dtype=np.int16)
    return np.clip(smooth.astype(np.int16) + noise, 0, 255).astype(np.uint8)


def picture(height: int, width: int, largest: int = 6000) -> PILImage.Image:
    return PILImage.fromarray(scenery(largest)[:height, :width])


def tiled(pixels: PILImage.Image, side: int, tiles: int = 4):
    vision = SimpleNamespace(image_size=side, max_num_tiles=tiles, tokens_per_tile=1)
    config: Any = SimpleNamespace(vision_config=vision, image_processor=CONFIG)
    return preprocess(Image(pixels, "test", "hash"), config)


def check_equal_to_the_hub(pixels: PILImage.Image, side: int, tiles: int = 4) -> None:
    theirs = hub_processor(side, tiles)(pixels, return_tensors="np")
    ours = tiled(pixels, side, tiles)
    count = len(ours.tensors[0])
    expected = theirs["pixel_values"][0, 0]
    assert ours.tensors[0].dtype == torch.float32
    assert np.array_equal(expected[:count].view(np.int32), ours.tensors[0].numpy().view(np.int32))
    assert not expected[count:].any()
    assert theirs["num_tiles"] == [[count]]
    assert theirs["aspect_ratio_ids"].tolist() == [ours.tensors[1].tolist()]
    assert theirs["aspect_ratio_mask"][0, 0].sum() == count


def grid(steps: int, largest: int) -> list[tuple[int, int]]:
    """steps x steps sizes (height, width), each side spaced evenly in its logarithm."""
    sides = sorted({round(largest ** (i / (steps - 1))) for i in range(steps)})
    rng, nearby = random.Random(1), []
    while len(sides) + len(nearby) < steps:  # small sides coincide after rounding
        nearby.append(rng.randint(1, largest))
    return [(h, w) for h in [*sides, *nearby] for w in [*sides, *nearby]]


@pytest.mark.parametrize(
    ("side", "steps"),
    [
        (112, 22),
        pytest.param(448, 6, marks=pytest.mark.slow),
        pytest.param(560, 6, marks=pytest.mark.slow),
    ],
)
def test_pixels_equal_the_hub_processor_bit_for_bit(side, steps):
    for height, width in grid(steps, 1500):
        check_equal_to_the_hub(picture(height, width, 1500), side)


@pytest.mark.slow
def test_2304_sizes_up_to_6000_equal_the_hub_processor_bit_for_bit():
    sizes = grid(48, 6000)
    assert len(set(sizes)) >= 2_000
    sides = [560, 112, 448, 112, 112, 112, 112]  # as many as meet every row and column of the grid
    for index, (height, width) in enumerate(sizes):
        check_equal_to_the_hub(picture(height, width), sides[index % len(sides)])


@pytest.mark.parametrize("tiles", [1, 2, 6])
def test_other_tile_counts_equal_the_hub_processor(tiles):
    for height, width in [(100, 300), (700, 200), (333, 334), (900, 900)]:
        check_equal_to_the_hub(picture(height, width, 1500), 112, tiles)


@pytest.mark.parametrize("size", [(65535, 1), (1, 65535)])
@pytest.mark.parametrize("side", [112, 560])
def test_the_thinnest_pictures_work(size, side):
    values = tiled(PILImage.new("RGB", size, "white"), side)
    assert len(values.tensors[0]) == 4
    assert torch.isfinite(values.tensors[0]).all()


def test_every_level_of_every_channel_is_normalised_as_defined():
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.stack([levels, levels[::-1], np.roll(levels, 99)], -1).reshape(16, 16, 3)
    pixels = pixels.repeat(7, axis=0).repeat(7, axis=1)  # 112 x 112: not resized
    values = tiled(PILImage.fromarray(pixels), 112).tensors[0][0].double().numpy()
    for channel in range(3):
        expected = (pixels[:, :, channel] / 255 - MEAN[channel]) / STD[channel]
        assert np.abs(values[channel] - expected).max() < 1e-6


def test_normalisation_equals_metas_float32_rule_bit_for_bit():
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(7, 7)
    ours = tiled(PILImage.fromarray(levels[..., None].expand(-1, -1, 3).numpy()), 112)
    for channel in range(3):
        scaled = levels.to(torch.float32).div(255)
        expected = scaled.sub(torch.tensor(MEAN[channel])).div(torch.tensor(STD[channel]))
        assert torch.equal(ours.tensors[0][0, channel], expected)


def test_padding_inside_the_canvas_is_normalised_black():
    values = tiled(PILImage.new("RGB", (112, 60), "white"), 112).tensors[0]
    for channel in range(3):
        black = -MEAN[channel] / STD[channel]
        assert values[0, channel, 60:].unique().numel() == 1
        assert math.isclose(values[0, channel, 80, 5].item(), black, rel_tol=1e-6)
        assert values[0, channel, :60].min() > 1.8


def test_tiles_run_row_by_row():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    canvas = PILImage.new("RGB", (224, 224))
    for index, colour in enumerate(colours):
        canvas.paste(PILImage.new("RGB", (112, 112), colour), (index % 2 * 112, index // 2 * 112))
    values = tiled(canvas, 112).tensors[0]
    assert tuple(values.shape) == (4, 3, 112, 112)
    for tile, colour in zip(values, colours, strict=True):
        for channel, level in enumerate(colour):
            assert (tile[channel] > 0).all() == (level == 200)


@pytest.mark.parametrize("size", [(100, 400), (400, 100), (224, 224), (100, 100)])
def test_tiles_lie_one_after_the_other_as_compiled_programs_read_them(size):
    assert tiled(PILImage.new("RGB", size), 112).tensors[0].is_contiguous()


def test_the_picture_itself_is_not_changed_and_its_hash_is_kept():
    image = from_pil(picture(50, 70, 1500))
    before = image.pixels.tobytes()
    vision = SimpleNamespace(image_size=112, max_num_tiles=4, tokens_per_tile=1)
    config: Any = SimpleNamespace(vision_config=vision, image_processor=CONFIG)
    result = preprocess(image, config)
    assert image.pixels.tobytes() == before
    assert result.content_hash == image.content_hash
    assert result.tensors[0].is_contiguous()
