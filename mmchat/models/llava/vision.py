"""The vision encoder, a CLIP ViT, and the projector: a square picture -> an embedding a patch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmchat.models.llava.config import LlavaConfig, VisionConfig
from mmchat.nn.attention import attend, merge_heads, split_heads
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import MLP
from mmchat.nn.patches import Layers, embed_patches


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 x), with which CLIP was trained; it is not the GELU of others."""
    return x * torch.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    """Multi-head attention with biases and without a mask. x: [I, N, E] -> [I, N, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj, self.k_proj = Linear(size, size), Linear(size, size)
        self.v_proj, self.out_proj = Linear(size, size), Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (split_heads(y, self.head_dim) for y in projections)
        return self.out_proj(merge_heads(attend(query, key, value)))


class VisionMLP(MLP):
    """fc2(quick_gelu(fc1(x))). x: [..., E] -> [..., E]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """A pre-norm block. x: [I, N, E] -> [I, N, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(size, eps=eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(size, eps=eps)
        self.mlp = VisionMLP(size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """Patches row by row behind a class token, with positions. [I, C, S, S] -> [I, N, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = embed_patches(pixels, self.patch_embedding)
        first = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat((first, x), dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """CLIP's encoder of pictures; what is behind the features has names and no use."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # so spelt
        self.encoder = Layers(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionTower(nn.Module):
    """Features of pictures, as the projector takes them."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config.vision_config)

    def slices(self, pixels: Tensor, features: list[Tensor]) -> Iterator[None]:
        """The features of pictures, a layer at a time, so that others may work between them.

        pixels: [I, C, S, S]. They are added to `features` at the end: [I, N, E].
        """
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(pixels))
        for layer in model.encoder.layers[: self.config.vision_layers_used]:
            x = layer(x)
            yield
        features.append(x if self.config.features.strategy == "full" else x[:, 1:])


class Projector(nn.Module):
    """Features of pictures to embeddings of the text, of which nothing else is normed or scaled."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = Linear(config.vision_config.hidden_size, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))
