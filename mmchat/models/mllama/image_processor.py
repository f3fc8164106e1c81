"""Picture to normalised tiles, bit for bit as the Hub's PIL image processor and Meta's reference.

Resize with Pillow's bilinear filter, paste on a black canvas, scale to 0..1, subtract the mean,
divide by the standard deviation, cut into tiles row by row. The black of the canvas is normalised
like any pixel, so padding inside a tile is -mean/std and not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage

from mmchat.conversation import Image
from mmchat.models.mllama.config import ImageProcessorConfig, VisionConfig
from mmchat.models.mllama.tiling import TileLayout, layout_facts, layout_of
from mmchat.models.prepared import normalised
from mmchat.models.prompt import MediaFacts


@dataclass(frozen=True, eq=False)
class TiledImage:
    """A picture as the vision encoder takes it.

    pixel_values: [T, C, S, S] float32, valid tiles only, row by row; S is the tile size.
    layout: how the picture lies on its canvas. content_hash: that of the picture. facts: what
    people are told.
    """

    pixel_values: torch.Tensor
    layout: TileLayout
    content_hash: str
    facts: MediaFacts

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """`pixel_values` and the aspect ratio id [1]."""
        return self.pixel_values, torch.tensor([self.layout.aspect_ratio_id])


def preprocess(
    image: Image, vision_config: VisionConfig, processor_config: ImageProcessorConfig
) -> TiledImage:
    """Resize, pad, normalise and cut one picture: RGB pixels -> [T, C, S, S] float32."""
    layout = layout_of(vision_config, image.height, image.width)
    height, width = layout.resized
    picture = image.pixels.resize((width, height), PILImage.Resampling.BILINEAR)
    canvas = np.zeros((*layout.canvas, 3), dtype=np.uint8)
    canvas[:height, :width] = np.asarray(picture)
    tiles_h, tiles_w = layout.aspect_ratio
    side = layout.tile_size
    values = normalised(canvas, processor_config.image_mean, processor_config.image_std)
    tiles = values.reshape(3, tiles_h, side, tiles_w, side).permute(1, 3, 0, 2, 4)
    # compiled programs read their inputs in this order, whatever the strides say
    tiles = tiles.reshape(layout.num_tiles, 3, side, side).contiguous()
    facts = layout_facts(layout, vision_config)
    return TiledImage(tiles, layout, image.content_hash, facts)
