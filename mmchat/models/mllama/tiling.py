"""How a picture lies on its canvas of tiles: sizes only, no pixels. Height before width.

A canvas is a grid of at most `max_num_tiles` square tiles. The picture keeps its proportions, is
enlarged at most until one side fills a tile, and sits in the top left corner; the rest is black.
The rules are those of Meta's reference and of the Hub's image processor, which agree bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.models.prompt import MediaFacts, PatchMap
from mmchat.words import pixels, plural

if TYPE_CHECKING:
    from mmchat.models.mllama.config import MllamaConfig, VisionConfig


@dataclass(frozen=True)
class TileLayout:
    """Where a picture lies on its canvas; all sizes are (height, width) in pixels.

    image_size: the picture before resizing. resized: the same on the canvas.
    aspect_ratio: the grid (tiles_h, tiles_w). aspect_ratio_id: its place among the supported grids,
    from 1. tile_size: side of one tile. Tiles are numbered row by row.
    """

    image_size: tuple[int, int]
    resized: tuple[int, int]
    aspect_ratio: tuple[int, int]
    aspect_ratio_id: int
    tile_size: int

    @property
    def canvas(self) -> tuple[int, int]:
        """Canvas size (height, width) in pixels."""
        return self.aspect_ratio[0] * self.tile_size, self.aspect_ratio[1] * self.tile_size

    @property
    def num_tiles(self) -> int:
        """Tiles of the canvas (T); every one of them is valid."""
        return self.aspect_ratio[0] * self.aspect_ratio[1]


def supported_aspect_ratios(max_num_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids (tiles_h, tiles_w) of at most `max_num_tiles`; the id of entry i is i + 1."""
    sides = range(1, max_num_tiles + 1)
    return tuple((h, w) for h in sides for w in sides if h * w <= max_num_tiles)


def choose_layout(height: int, width: int, tile_size: int, max_num_tiles: int) -> TileLayout:
    """Choose the canvas for a picture of `height` x `width` pixels and its size on it.

    Of the canvases that hold the picture unshrunk, the one that leaves the least room around it;
    otherwise the one that shrinks it least; on a tie the one of the smallest area.
    Raises ValueError if a size is not positive.
    """
    if min(height, width, tile_size, max_num_tiles) < 1:
        raise ValueError(
            f"sizes must be positive: {height} x {width}, tiles {tile_size}, {max_num_tiles}"
        )
    grids = supported_aspect_ratios(max_num_tiles)
    scales = [min(h * tile_size / height, w * tile_size / width) for h, w in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    scale = min(enlarging) if enlarging else max(scales)
    index = min(
        (i for i, candidate in enumerate(scales) if candidate == scale),
        key=lambda i: grids[i][0] * grids[i][1],
    )
    canvas = (grids[index][0] * tile_size, grids[index][1] * tile_size)
    return TileLayout(
        image_size=(height, width),
        resized=_fit(height, width, canvas, tile_size),
        aspect_ratio=grids[index],
        aspect_ratio_id=index + 1,
        tile_size=tile_size,
    )


def layout_of(config: VisionConfig, height: int, width: int) -> TileLayout:
    """How a picture of `height` x `width` pixels lies on the canvas of a model."""
    return choose_layout(height, width, config.image_size, config.max_num_tiles)


def facts(config: MllamaConfig, height: int, width: int) -> MediaFacts:
    """What people are told about a picture of `height` x `width` pixels."""
    return layout_facts(layout_of(config.vision_config, height, width), config.vision_config)


def patches(config: MllamaConfig, height: int, width: int) -> PatchMap:
    """Where the patches of a picture of `height` x `width` pixels lie, without those of padding."""
    vision, layout = config.vision_config, layout_of(config.vision_config, height, width)
    side, columns = vision.image_size // vision.patch_size, layout.aspect_ratio[1]
    rows, cols = (math.ceil(pixels / vision.patch_size) for pixels in layout.resized)

    def token(y: int, x: int) -> int:
        tile = y // side * columns + x // side
        # each tile's class token is its first
        return tile * vision.tokens_per_tile + 1 + y % side * side + x % side

    return PatchMap(
        tuple(tuple(token(y, x) for x in range(cols)) for y in range(rows)),
        (
            vision.patch_size * height / layout.resized[0],
            vision.patch_size * width / layout.resized[1],
        ),
    )


def picture_size(config: MllamaConfig, cells: int) -> tuple[int, int] | None:
    """(height, width) of a picture on so many tiles, two rows of them where that is a square."""
    if not 1 <= cells <= config.vision_config.max_num_tiles:
        return None
    rows, side = 2 if cells == 4 else 1, config.vision_config.image_size
    return rows * side, cells // rows * side


def layout_facts(layout: TileLayout, config: VisionConfig) -> MediaFacts:
    """The same of a picture that lies so."""
    padding = 1 - math.prod(layout.resized) / math.prod(layout.canvas)
    resized, canvas = pixels(layout.resized), pixels(layout.canvas)
    cut = plural(layout.num_tiles, "tile")
    if layout.num_tiles > 1:
        rows, columns = layout.aspect_ratio
        cut += f" ({plural(rows, 'row')}, {plural(columns, 'column')})"
    return MediaFacts(
        size=layout.image_size,
        resized=layout.resized,
        grid=layout.aspect_ratio,
        tokens=layout.num_tiles * config.tokens_per_tile,
        positions=1,
        placed=f"{resized} on a canvas of {canvas}",
        cut=cut,
        lines=(
            ("canvas", f"{canvas}, {cut}"),
            ("on the canvas", f"{resized} at the top left, {padding:.0%} padding"),
        ),
        details={
            "canvas": list(layout.canvas),
            "tile_grid": list(layout.aspect_ratio),
            "tile_size": layout.tile_size,
        },
    )


def _fit(height: int, width: int, canvas: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """Size (height, width) of the picture on `canvas`; each side is at least 1 pixel.

    A side aims at its own length, but not below one tile nor above the canvas. The side that
    limits the scale gets its target exactly, the other is rounded down.
    """
    target_h = min(max(height, tile_size), canvas[0])
    target_w = min(max(width, tile_size), canvas[1])
    scale_h, scale_w = target_h / height, target_w / width
    if scale_w < scale_h:
        return min(math.floor(height * scale_w) or 1, target_h), target_w
    return target_h, min(math.floor(width * scale_h) or 1, target_w)
