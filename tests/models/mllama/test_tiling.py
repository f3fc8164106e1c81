import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from mmchat.catalog.known import find_spec
from mmchat.models.mllama.footprint import footprint
from mmchat.models.mllama.tiling import (
    choose_layout,
    facts,
    picture_size,
    supported_aspect_ratios,
)

CONFIG_11B = find_spec("llama3.2-11B").config

# (width, height) -> (tiles_h, tiles_w) on tiles of 560 pixels, from runs of Meta's reference.
META_CASES = {
    (560, 560): (1, 1),
    (100, 100): (1, 1),
    (1, 1): (1, 1),
    (1120, 560): (1, 2),
    (1121, 560): (1, 3),
    (640, 480): (1, 2),
    (300, 800): (2, 1),
    (561, 561): (2, 2),
    (1119, 1119): (2, 2),
    (2000, 1500): (2, 2),
    (1080, 1920): (2, 2),
    (2240, 560): (1, 4),
    (2241, 561): (1, 4),
    (4000, 300): (1, 4),
    (37, 3000): (4, 1),
}


def hub() -> Any:
    # takes seconds to import, which those who run other tests need not wait for
    from transformers.models.mllama import image_processing_pil_mllama

    return image_processing_pil_mllama


def hub_layout(height: int, width: int, side: int, tiles: int):
    canvas = hub().get_optimal_tiled_canvas(height, width, tiles, side)
    size = hub().get_image_size_fit_to_canvas(height, width, *canvas, side)
    return tuple(int(v) for v in canvas), tuple(int(v) for v in size)


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Sizes (height, width) from 1 to 6000, many small, many near multiples of a tile side."""
    rng = random.Random(seed)
    edges = [n * side + d for side in (112, 448, 560) for n in (1, 2, 3, 4) for d in (-1, 0, 1)]

    def one() -> int:
        kind = rng.randrange(3)
        if kind == 0:
            return rng.choice(edges)
        return rng.randint(1, 6000) if kind == 1 else int(6000 ** rng.random())

    return [(one(), one()) for _ in range(count)]


@pytest.mark.parametrize(("size", "grid"), META_CASES.items())
def test_the_grid_is_metas(size, grid):
    width, height = size
    assert choose_layout(height, width, 560, 4).aspect_ratio == grid


@pytest.mark.parametrize(
    ("height", "width", "placed", "cut"),
    [
        (280, 560, "560 x 280 px on a canvas of 560 x 560 px", "1 tile"),
        (900, 300, "300 x 900 px on a canvas of 560 x 1120 px", "2 tiles (2 rows, 1 column)"),
    ],
)
def test_facts_are_in_words_of_tiles(height, width, placed, cut):
    told = facts(CONFIG_11B, height, width)
    assert (told.placed, told.cut) == (placed, cut)
    assert told.lines[0] == ("canvas", f"{placed.rpartition('canvas of ')[2]}, {cut}")
    assert told.tokens == 1601 * math.prod(told.grid)


def test_a_picture_can_be_had_for_each_number_of_tiles_up_to_the_most():
    sizes = [picture_size(CONFIG_11B, tiles) for tiles in range(6)]
    assert (sizes[0], sizes[5]) == (None, None)
    assert [math.prod(facts(CONFIG_11B, *size).grid) for size in sizes[1:5]] == [1, 2, 3, 4]
    assert math.prod(footprint(CONFIG_11B).largest_picture.grid) == 4


def test_an_unenlarged_picture_keeps_its_size():
    assert choose_layout(480, 640, 560, 4).resized == (480, 640)


@pytest.mark.parametrize("side", [112, 448, 560])
def test_layouts_equal_the_hub_processors(side):
    for height, width in sizes(4_000, seed=side):
        layout = choose_layout(height, width, side, 4)
        assert (layout.canvas, layout.resized) == hub_layout(height, width, side, 4)


@pytest.mark.slow
@pytest.mark.parametrize("side", [112, 448, 560])
@pytest.mark.parametrize("tiles", [1, 2, 4, 6])
def test_many_layouts_equal_the_hub_processors(side, tiles):
    for height, width in sizes(15_000, seed=side + tiles):
        layout = choose_layout(height, width, side, tiles)
        assert (layout.canvas, layout.resized) == hub_layout(height, width, side, tiles)


@pytest.mark.parametrize("side", [448, 560])
def test_the_grid_is_the_same_when_scales_are_float32_as_in_metas_code(side):
    drawn = torch.tensor(sizes(40_000, seed=side + 1))
    grids = torch.tensor(supported_aspect_ratios(4))
    scales = (grids[None] * side / drawn[:, None].float()).amin(-1)  # [sizes, grids]
    enlarging = torch.where(scales >= 1, scales, torch.inf).amin(1)
    best = torch.where(enlarging.isinf(), scales.amax(1), enlarging)
    areas = torch.where(scales == best[:, None], grids.prod(1), 99)
    expected = areas.argmin(1).tolist()
    for (height, width), index in zip(drawn.tolist(), expected, strict=True):
        assert choose_layout(height, width, side, 4).aspect_ratio_id == index + 1


@pytest.mark.parametrize("tiles", [1, 2, 4, 6])
def test_the_ids_are_the_hubs(tiles):
    assert list(supported_aspect_ratios(tiles)) == hub().get_all_supported_aspect_ratios(tiles)
    for height, width in sizes(300, seed=tiles):
        layout = choose_layout(height, width, 112, tiles)
        assert supported_aspect_ratios(tiles)[layout.aspect_ratio_id - 1] == layout.aspect_ratio


@pytest.mark.parametrize("size", [(1, 65535), (65535, 1), (1, 1), (65535, 65535), (1, 2240)])
@pytest.mark.parametrize("side", [112, 448, 560])
def test_every_side_keeps_a_pixel_and_fits_the_canvas(size, side):
    layout = choose_layout(*size, side, 4)
    assert 1 <= layout.resized[0] <= layout.canvas[0]
    assert 1 <= layout.resized[1] <= layout.canvas[1]
    assert layout.image_size == size


def test_proportions_are_kept_and_one_side_touches_its_target():
    for height, width in sizes(500, seed=5):
        layout = choose_layout(height, width, 560, 4)
        targets = np.clip(layout.image_size, 560, layout.canvas)
        assert any(a == b for a, b in zip(layout.resized, targets, strict=True))
        scale = min(layout.resized[0] / height, layout.resized[1] / width)
        other = max(height, width) * scale
        assert abs(max(layout.resized) - other) <= max(1.0, max(height, width) / min(height, width))


@pytest.mark.parametrize("bad", [(0, 5, 560, 4), (5, -1, 560, 4), (5, 5, 0, 4), (5, 5, 560, 0)])
def test_sizes_must_be_positive(bad):
    with pytest.raises(ValueError, match="positive"):
        choose_layout(*bad)
