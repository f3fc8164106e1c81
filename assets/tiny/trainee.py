"""The built-in model while it learns: its shape, heads for patch labels, its first weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from batches import AUXILIARY, CLIP, Batch, Rows
from torch import Tensor, nn

from mmchat.models import base
from mmchat.models.mllama.config import MllamaConfig, RopeScaling, TextConfig, VisionConfig
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.mllama.text import SeenSteps
from mmchat.models.row_cache import Place
from mmchat.nn.attention import KeyValue, attend

AUXILIARY_WEIGHTS = {
    "kind": 2.0, "colour": 1.0, "cell": 1.0, "count": 1.0, "word": 0.5, "tens": 0.3, "units": 0.3,
}  # fmt: skip
TILE_TABLES = ("tile_embedding.weight", "tile_positional_embedding.embedding.weight")


def tiny_config(vocab_size: int) -> MllamaConfig:
    """The built-in model's architecture; model_params/tiny.json says the same."""
    vision = VisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_global_layers=2,
        attention_heads=4,
        num_channels=3,
        image_size=112,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=(1, 3),
        norm_eps=1e-5,
    )
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        cross_attention_layers=(1, 4),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    )
    return MllamaConfig(vision, text, CLIP)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as matrix products; the CPU's fused kernel takes twice as long backwards."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -1e4).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    return torch.softmax(scores, -1) @ value


class NewRows:
    """The past of rows of one length that begin here: the keys that they bring."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [N, H, D], key, value: [N, G, D] -> [N, H·D]"""
        new = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (query, key, value))
        return attend(*new, causal=True).transpose(1, 2).flatten(2).flatten(0, 1)


class Trainee(nn.Module):
    """The model and the auxiliary heads on its vision features."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.model = MllamaForConditionalGeneration(config)
        size = config.vision_config.output_dim
        self.heads = nn.ModuleDict({name: nn.Linear(size, n) for name, n in AUXILIARY.items()})
        initialise(self)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of the wanted tokens, [N, V], and the auxiliary loss."""
        pictures: list[KeyValue] = []
        auxiliary = torch.zeros((), device=batch.parts[0].input_ids.device)
        if batch.tiles is not None and batch.aspect_ratio_ids is not None:
            features = self.model.vision_model(batch.tiles, batch.aspect_ratio_ids)
            states = self.model.multi_modal_projector(features)
            pictures = self.model.cross_key_values(states)
            auxiliary = self._auxiliary_loss(features, batch.labels)
        return torch.cat([self._logits(part, pictures) for part in batch.parts]), auxiliary

    def _logits(self, part: Rows, pictures: Sequence[KeyValue]) -> Tensor:
        """Of the tokens before each wanted one: [N, V]. pictures: of each cross layer, all."""
        ids, wanted = part.input_ids[:, :-1], part.wanted[:, 1:].flatten()
        rows, length = ids.shape
        places = {tuple(at for at, _ in placed) for placed in part.pictures}
        if len(places) > 1 or len(min(places)) > 1:
            return self._logits_of_any(part, pictures)
        seen = []
        if min(places):
            [[at]] = places
            numbers = torch.tensor([number for ((_, number),) in part.pictures], device=ids.device)
            sees = (torch.arange(length, device=ids.device) >= at)[None, :, None]
            seen = [SeenSteps(key[numbers], value[numbers], None, sees) for key, value in pictures]
        text = self.model.language_model
        past = [NewRows(rows)] * len(text.model.layers)
        positions = torch.arange(length, device=ids.device).repeat(rows)
        hidden = text.model(ids.flatten(), positions, past, seen)
        return text.lm_head(hidden[wanted]).float()

    def _logits_of_any(self, part: Rows, pictures: Sequence[KeyValue]) -> Tensor:
        """`_logits` of rows with any pictures anywhere, as the engine reads them; slower."""
        ids, wanted = part.input_ids[:, :-1], part.wanted[:, 1:].flatten()
        rows, length = ids.shape
        cache = self.model.new_cache(rows, length)
        for row, placed in enumerate(part.pictures):
            cache.places[row] = tuple(Place(at, at + 1, str(number)) for at, number in placed)
        split = [list(zip(*(x.split(1) for x in pair), strict=True)) for pair in pictures]
        for number, key_values in enumerate(zip(*split, strict=True)):
            cache.keep_media(str(number), key_values)
        indices = tuple(wanted.nonzero()[:, 0].tolist())
        every = tuple(range(rows))
        read = base.Batch(ids.flatten(), every, (0,) * rows, (length,) * rows, indices)
        return self.model(read, cache)

    def _auxiliary_loss(self, features: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of each head over the patches that have its label, summed."""
        total = torch.zeros((), device=features.device)
        for name, head in self.heads.items():
            label = labels[name]
            known = label >= 0
            if name == "kind":
                known &= (label > 0) | (torch.rand(label.shape, device=label.device) < 0.1)
            if known.any():
                loss = F.cross_entropy(head(features[known]).float(), label[known])
                total = total + AUXILIARY_WEIGHTS[name] * loss
        return total

    def share_tile_gradients(self) -> None:
        """Give a tile's place one gradient on all canvases, so that the tables stay shared."""
        vision = self.model.vision_model
        for name, parameter in vision.named_parameters():
            if name.endswith(TILE_TABLES) and parameter.grad is not None:
                parameter.grad = share_tiles(parameter.grad, vision.config, "sum")


def share_tiles(table: Tensor, config: VisionConfig, how: str = "mean") -> Tensor:
    """One value for each (row, column) of a tile, whatever the canvas; unused slots are zero.

    table: [1 + canvases, T·N] -> the same shape. how: "mean" or "sum" over the canvases. Meta's
    format holds no other tables, and the released models have no other.
    """
    most = config.max_num_tiles
    cells = torch.full((len(config.aspect_ratios) + 1, most), most * most)
    for row, (tiles_h, tiles_w) in enumerate(config.aspect_ratios, start=1):
        for tile in range(tiles_h * tiles_w):
            cells[row, tile] = tile // tiles_w * most + tile % tiles_w
    cells = cells.flatten().to(table.device)
    slots = table.unflatten(1, (most, -1)).flatten(0, 1)
    total = slots.new_zeros(most * most + 1, slots.shape[1]).index_add_(0, cells, slots)
    if how == "mean":
        total /= torch.bincount(cells, minlength=len(total)).clamp(min=1)[:, None]
    total[-1] = 0
    return total[cells].view(table.shape)


def initialise(trainee: Trainee) -> None:
    """Random weights, every gate at 1, positions of the canvas as sines and cosines."""
    for name, parameter in trainee.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name or "lm_head" in name or "tile_positional" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            residual = any(part in name for part in ("o_proj", "down_proj", "fc2"))
            nn.init.normal_(parameter, std=(0.3 if residual else 0.7) * fan_in**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    vision = trainee.model.vision_model
    config, positions = vision.config, vision.gated_positional_embedding
    grid = config.image_size // config.patch_size
    with torch.no_grad():
        positions.embedding.copy_(_waves(grid, 0, 0, config.hidden_size))
        table = positions.tile_embedding.weight.zero_()
        for row, (tiles_h, tiles_w) in enumerate(config.aspect_ratios, start=1):
            tiles = [
                _waves(grid, r * grid, c * grid, config.hidden_size)
                for r in range(tiles_h)
                for c in range(tiles_w)
            ]
            flat = torch.stack(tiles).flatten()
            table[row, : flat.numel()] = flat
        for name, parameter in vision.named_parameters():
            if name.endswith(TILE_TABLES):
                parameter.copy_(share_tiles(parameter, config))


def _waves(grid: int, top: int, left: int, size: int) -> Tensor:
    """Two-dimensional sine positions of one tile and a zero for the class token: [P, E]."""
    frequencies = 2 * math.pi / (4 * 20 ** torch.linspace(0, 1, size // 4))
    rows = (torch.arange(grid) + top)[:, None] * frequencies
    columns = (torch.arange(grid) + left)[:, None] * frequencies
    rows = torch.cat((rows.sin(), rows.cos()), 1)[:, None].expand(grid, grid, -1)
    columns = torch.cat((columns.sin(), columns.cos()), 1)[None].expand(grid, grid, -1)
    waves = torch.cat((rows, columns), -1).flatten(0, 1)
    return 0.3 * torch.cat((torch.zeros(1, size), waves))
