"""The vision encoder: a picture's tiles -> one feature vector for every patch.

The reference pads each picture to `max_num_tiles` tiles and each tile to a multiple of 8 tokens,
and masks only the pairs in which query and key are both padding. Two exact shortcuts follow:

- Padding never reads padding, so all padding tiles stay equal in every layer, and so do the pad
  tokens of one tile. One of each is computed; its key counts as many times as it stands for, by
  adding log(count) to its logits. Padding tiles begin equal where the tile tables hold zeros for
  them, as in all released models. Training in transformers fills those, which `finish_loading`
  sees: then every tile is computed, and pad tokens alone are shared.
- Valid queries see every key and padding queries see the valid keys: two attentions without a
  pairwise mask, and none at all for the padding queries of the last layer, which nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmchat.models.mllama.config import VisionConfig
from mmchat.nn.attention import attend, merge_heads, split_heads
from mmchat.nn.linear import Linear
from mmchat.nn.mlp import MLP
from mmchat.nn.patches import Layers, embed_patches

OUTER_NORM_EPS = 1e-5  # in both references, whatever `norm_eps` of the layers is


class VisionAttention(nn.Module):
    """Multi-head attention without biases over valid and padding tokens.

    x: [I, N, E] -> [I, N, E], or [I, num_valid, E] if `valid_only`. The first `num_valid` tokens
    are valid. log_counts: [N], log of how many equal tokens each token stands for.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj = Linear(size, size, bias=False)
        self.k_proj = Linear(size, size, bias=False)
        self.v_proj = Linear(size, size, bias=False)
        self.o_proj = Linear(size, size, bias=False)

    def forward(self, x: Tensor, num_valid: int, log_counts: Tensor, valid_only: bool) -> Tensor:
        queries = x[:, :num_valid] if valid_only else x
        query = split_heads(self.q_proj(queries), self.head_dim)
        key = split_heads(self.k_proj(x), self.head_dim)
        value = split_heads(self.v_proj(x), self.head_dim)
        mask = log_counts[None, None, None]
        out = merge_heads(attend(query[:, :, :num_valid], key, value, mask=mask))
        if not valid_only:
            valid = key[:, :, :num_valid], value[:, :, :num_valid]
            padding = merge_heads(attend(query[:, :, num_valid:], *valid))
            out = torch.cat((out, padding), dim=1)
        return self.o_proj(out)


class VisionLayer(nn.Module):
    """One pre-norm block of the local transformer. Arguments as in VisionAttention."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self, x: Tensor, num_valid: int, log_counts: Tensor, valid_only: bool = False
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), num_valid, log_counts, valid_only)
        x = (x[:, :num_valid] if valid_only else x) + self.attention_scale() * attended
        return x + self.mlp_scale() * self.mlp(self.post_attention_layernorm(x))

    def attention_scale(self) -> Tensor | float:
        return 1.0

    def mlp_scale(self) -> Tensor | float:
        return 1.0


class GatedVisionLayer(VisionLayer):
    """A block of the global transformer: both branches are scaled by tanh of a learned gate [1]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.gate_attn = nn.Parameter(torch.full((1,), math.pi / 4))
        self.gate_ffn = nn.Parameter(torch.full((1,), math.pi / 4))

    def attention_scale(self) -> Tensor:
        return self.gate_attn.tanh()

    def mlp_scale(self) -> Tensor:
        return self.gate_ffn.tanh()


class TileEmbedding(nn.Module):
    """One learned vector per tile of each canvas, scaled by tanh(gate).

    aspect_ratio_ids: [I] -> [I, T, 1, E] for the first `num_tiles` tiles.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        rows = len(config.aspect_ratios) + 1
        self.embedding = nn.Embedding(rows, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))
        self.size = config.hidden_size

    def forward(self, aspect_ratio_ids: Tensor, num_tiles: int) -> Tensor:
        table = self.embedding(aspect_ratio_ids).unflatten(-1, (-1, 1, self.size))
        return self.gate.tanh() * table[:, :num_tiles]


class PositionEmbedding(nn.Module):
    """Positions inside a tile, the same in all tiles, blended with positions on the whole canvas.

    aspect_ratio_ids: [I] -> [I, T, P, E] for the first `num_tiles` tiles.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        tokens, size = config.tokens_per_tile, config.hidden_size
        rows = len(config.aspect_ratios) + 1
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.empty(tokens, size))
        self.tile_embedding = nn.Embedding(rows, config.max_num_tiles * tokens * size)

    def inside_tile(self) -> Tensor:
        """[P, E]: all the position that a padding tile gets where the tables are zero."""
        return (1 - self.gate.tanh()) * self.embedding

    def forward(self, aspect_ratio_ids: Tensor, num_tiles: int) -> Tensor:
        table = self.tile_embedding(aspect_ratio_ids)
        on_canvas = table.unflatten(-1, (-1, *self.embedding.shape))[:, :num_tiles]
        return self.inside_tile() + self.gate.tanh() * on_canvas


class VisionModel(nn.Module):
    """Tiles of pictures with equal tile counts -> features of their valid tokens.

    tiles: [I, T, C, S, S] (S pixels), aspect_ratio_ids: [I] -> [I, T·P, output_dim].
    A token's features are the last hidden state and, channel by channel, the inputs of the layers
    in `intermediate_layers_indices`. padding_is_equal: one padding tile may stand for all.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.padding_is_equal = True
        size = config.hidden_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, size, config.patch_size, config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(size, eps=OUTER_NORM_EPS)
        self.layernorm_post = nn.LayerNorm(size, eps=OUTER_NORM_EPS)
        self.transformer = Layers(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.global_transformer = Layers(
            GatedVisionLayer(config) for _ in range(config.num_global_layers)
        )

    def finish_loading(self) -> None:
        """See whether the loaded tables are zero for the tiles that a canvas does not have."""
        tables = (
            self.pre_tile_positional_embedding.embedding.weight,
            self.gated_positional_embedding.tile_embedding.weight,
            self.post_tile_positional_embedding.embedding.weight,
        )
        self.padding_is_equal = not any(
            bool(table[row].unflatten(0, (self.config.max_num_tiles, -1))[h * w :].any())
            for table in tables
            for row, (h, w) in enumerate(self.config.aspect_ratios, start=1)
        )

    def forward(self, tiles: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        features: list[Tensor] = []
        for _ in self.slices(tiles, aspect_ratio_ids, features):
            pass
        return features[0]

    def slices(
        self, tiles: Tensor, aspect_ratio_ids: Tensor, features: list[Tensor]
    ) -> Iterator[None]:
        """`forward` in slices of a layer, so that others may work between them.

        Its result is added to `features` at the end: nothing else of it is held from outside.
        """
        num_valid = tiles.shape[1] * self.config.tokens_per_tile
        if not self.padding_is_equal:
            most = self.config.max_num_tiles
            black = tiles.new_zeros(len(tiles), most, *tiles.shape[2:])
            tiles = torch.cat((tiles, black), dim=1)[:, :most]
        images, num_tiles = tiles.shape[:2]
        x = torch.cat((self._embed(tiles, aspect_ratio_ids), self._padding(images, num_tiles)), 1)
        log_counts = self._log_counts(num_tiles, x)
        saved = {}
        for index, layer in enumerate(self.transformer.layers):
            if index in self.config.intermediate_layers_indices:
                saved[index] = x[:, :num_valid]  # its input: transformers takes these a layer late
            x = layer(x, num_valid, log_counts)
            yield
        x = self._add_post_tile(self.layernorm_post(x), aspect_ratio_ids, num_tiles)
        last = self.config.num_global_layers - 1
        for index, layer in enumerate(self.global_transformer.layers):
            x = layer(x, num_valid, log_counts, valid_only=index == last)
            yield
        chosen = [saved[index] for index in self.config.intermediate_layers_indices]
        between = torch.stack(chosen, dim=-1).flatten(-2)
        features.append(torch.cat((x[:, :num_valid], between), dim=-1))

    def layer_work(self, images: int, num_tiles: int) -> int:
        """Multiply-adds of the matrix products of a layer for pictures of so many tiles."""
        config = self.config
        computed = min(num_tiles + 1, config.max_num_tiles)  # with one of padding
        if not self.padding_is_equal:
            computed = config.max_num_tiles
        size = config.hidden_size
        of_token = 4 * size * size + 2 * size * config.intermediate_size
        return images * computed * config.tokens_per_tile * of_token

    def _embed(self, tiles: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Embedded patches and class tokens of the tiles: [I, T·P, E]."""
        images, num_tiles = tiles.shape[:2]
        x = embed_patches(tiles.flatten(0, 1), self.patch_embedding)
        x = x.unflatten(0, (images, num_tiles))  # [I, T, grid², E]
        x = x + self.pre_tile_positional_embedding(aspect_ratio_ids, num_tiles)
        class_token = self.class_embedding.expand(images, num_tiles, 1, -1)
        x = torch.cat((class_token, x), dim=2)
        x = x + self.gated_positional_embedding(aspect_ratio_ids, num_tiles)
        return self.layernorm_pre(x).flatten(1, 2)

    def _padding(self, images: int, num_tiles: int) -> Tensor:
        """One pad token for each tile, then one padding tile and its pad token: [I, N, E].

        The padding tile is left out where there are tiles in every slot.
        """
        position = self.gated_positional_embedding.inside_tile()
        pad_tokens = position.new_zeros(num_tiles, position.shape[-1])
        if num_tiles == self.config.max_num_tiles:
            return pad_tokens.expand(images, -1, -1)
        patches = torch.cat((self.class_embedding[None] + position[:1], position[1:]))
        padding_tile = self.layernorm_pre(patches)
        return torch.cat((pad_tokens, padding_tile, pad_tokens[:1])).expand(images, -1, -1)

    def _log_counts(self, num_tiles: int, x: Tensor) -> Tensor:
        """[N]: log of how many tokens of the padded picture each computed token stands for."""
        tokens, pads = self.config.tokens_per_tile, self.config.pad_tokens_per_tile
        # bfloat16 would be off by 0.3 %; kernels of GPUs want the dtype of the queries
        on_cpu = x.device.type == "cpu"
        dtype = torch.promote_types(x.dtype, torch.float32) if on_cpu else x.dtype
        missing = self.config.max_num_tiles - num_tiles
        runs = [(num_tiles * tokens, 1), (num_tiles, pads)]  # (how many tokens, count of each)
        if num_tiles != self.config.max_num_tiles:
            runs += [(tokens, missing), (1, missing * pads)]
        # in float64, so that only the logarithm is rounded
        counts = [torch.full((n,), c, dtype=torch.float64, device=x.device) for n, c in runs]
        return torch.cat(counts).log().to(dtype)

    def _add_post_tile(self, x: Tensor, aspect_ratio_ids: Tensor, num_tiles: int) -> Tensor:
        """Add the second tile embedding to the tiles' tokens, their pad tokens included."""
        end = num_tiles * self.config.tokens_per_tile
        embedding = self.post_tile_positional_embedding(aspect_ratio_ids, num_tiles)
        tokens = x[:, :end].unflatten(1, (num_tiles, -1)) + embedding
        pads = x[:, end : end + num_tiles] + embedding.squeeze(2)
        return torch.cat((tokens.flatten(1, 2), pads, x[:, end + num_tiles :]), dim=1)
