"""The vision encoder and the resampler: a square picture -> a fixed number of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmchat.models.qwen_vl.config import HEAD_DIM, QwenVLConfig, VisionConfig
from mmchat.nn.attention import attend, merge_heads, split_heads
from mmchat.nn.linear import Linear
from mmchat.nn.patches import embed_patches

EPS = 1e-6  # of all norms here


def for_grid(table: Tensor, patches: int) -> Tensor:
    """A table of positions on a square, [M, E], resized to so many patches, [N, E]."""
    side, wanted = isqrt(len(table)), isqrt(patches)
    if side == wanted:
        return table
    square = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, (wanted, wanted), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


class VisionAttention(nn.Module):
    """Multi-head attention with biases and without a mask. x: [I, N, E] -> [I, N, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.in_proj = Linear(config.width, 3 * config.width)  # query, key and value, head by head
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = split_heads(self.in_proj(x), 3 * self.head_dim).chunk(3, dim=-1)
        return self.out_proj(merge_heads(attend(query, key, value)))


class VisionMLP(nn.Module):
    """c_proj(gelu(c_fc(x))). x: [..., E] -> [..., E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, config.intermediate_size)
        self.c_proj = Linear(config.intermediate_size, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionLayer(nn.Module):
    """A pre-norm block. x: [I, N, E] -> [I, N, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.width, eps=EPS), VisionAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.width, eps=EPS), VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionLayers(nn.Module):
    """The stack of blocks; its parameters sit under `resblocks`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))


class CrossAttention(nn.Module):
    """Multi-head attention. query: [Q, E], key, value: [I, N, E] -> [I, Q, E].

    The weight of its projections is a parameter here, as the checkpoints name it; being 0.5 % of
    the model, it is not quantised.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size))
        self.out_proj = Linear(size, size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        projections = zip(
            (query.expand(len(key), -1, -1), key, value),
            self.in_proj_weight.chunk(3),
            self.in_proj_bias.chunk(3),
            strict=True,
        )
        heads = (split_heads(F.linear(*one), HEAD_DIM) for one in projections)
        return self.out_proj(merge_heads(attend(*heads)))


class Resampler(nn.Module):
    """Learnt queries look at the patches. x: [I, N, W] -> [I, Q, E]."""

    def __init__(self, config: VisionConfig, size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(config.n_queries, size))
        self.pos_embed = nn.Parameter(torch.zeros(config.n_queries, size))
        self.kv_proj = Linear(config.width, size, bias=False)
        self.attn = CrossAttention(size)
        self.ln_q, self.ln_kv = nn.LayerNorm(size, eps=EPS), nn.LayerNorm(size, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_kv(self.kv_proj(x))
        query = self.ln_q(self.query) + self.pos_embed
        return self.attn(query, x + for_grid(self.pos_embed, x.shape[1]), x)


class VisionModel(nn.Module):
    """Pictures to embeddings of the text."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        vision, size = config.vision_config, config.text_config.hidden_size
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(vision.n_queries, vision.width))
        self.ln_pre = nn.LayerNorm(vision.width, eps=EPS)
        self.transformer = VisionLayers(vision)
        self.attn_pool = Resampler(vision, size)
        self.ln_post = nn.LayerNorm(size, eps=EPS)
        self.proj = nn.Parameter(torch.zeros(size, size))

    def slices(self, pixels: Tensor, embeddings: list[Tensor]) -> Iterator[None]:
        """The embeddings of pictures, a layer at a time, so that others may work between them.

        pixels: [I, C, S, S]. They are added to `embeddings` at the end: [I, Q, E].
        """
        x = self.patches(pixels)
        x = self.ln_pre(x + for_grid(self.positional_embedding, x.shape[1]))
        for layer in self.transformer.resblocks:
            x = layer(x)
            yield
        embeddings.append(self.ln_post(self.attn_pool(x)) @ self.proj)

    def patches(self, pixels: Tensor) -> Tensor:
        """[I, C, S, S] -> [I, N, W], row by row."""
        return embed_patches(pixels, self.conv1)
