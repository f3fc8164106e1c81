"""Pictures cut into patches, which a matrix embeds: a convolution whose windows do not overlap."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from mmchat.quant.kernels import ops


class Layers(nn.Module):
    """The blocks of an encoder of patches; their parameters sit under `layers`."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def embed_patches(pixels: Tensor, embedding: nn.Conv2d) -> Tensor:
    """pixels: [I, C, S, S] -> [I, N, E], row by row. embedding: of stride P, without a bias."""
    weight = embedding.weight
    images, channels, side, _ = pixels.shape
    patch = weight.shape[-1]
    grid = side // patch
    patches = pixels.reshape(images, channels, grid, patch, grid, patch)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images, grid * grid, -1)
    return ops.linear(patches.to(weight.dtype), weight.flatten(1))  # over channel, row and column
