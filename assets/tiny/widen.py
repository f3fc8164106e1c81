"""First weights from a smaller, trained model: it goes on where that one stopped.

Text: exact. New channels start at zero, new heads and units write nothing yet. Vision: close. Layer
norms see a few more zeros, two heads share one of twice the width, the weakest units of a network
go, tables of tile positions are averaged over the canvases. Tokens keep their embeddings by their
bytes; new ones start as the mean of the pieces that they replace.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from batches import Chat
from torch import Tensor
from trainee import TILE_TABLES, Trainee, share_tiles

from mmchat.models.mllama.config import VisionConfig

OLD_HEADS = 5  # of a vision layer of the smaller model


@torch.no_grad()
def widen(trainee: Trainee, old: dict[str, Tensor], old_chat: Chat, chat: Chat) -> None:
    """Copy the weights `old` of a smaller model into `trainee`, whose new parts write zero."""
    old = {name: weight.float() for name, weight in old.items()}
    config = trainee.model.config.vision_config
    old_width = old["vision_model.class_embedding"].numel()
    if old_width != config.hidden_size:
        _adapt_vision(old, config)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        old[name] = _move_tokens(old[name], old_chat, chat)
    for name, parameter in trainee.model.named_parameters():
        _place(name, parameter, old[name], old_width)
    for name, parameter in trainee.model.vision_model.named_parameters():
        if name.endswith(TILE_TABLES):
            parameter.copy_(share_tiles(parameter, config))


def _place(name: str, new: Tensor, old: Tensor, old_width: int) -> None:
    """Put `old` at the start of every axis of `new`; what writes to new channels is zero."""
    if new.shape == old.shape:
        new.copy_(old)
        return
    if name.endswith(TILE_TABLES):
        old = old.unflatten(1, (-1, old_width))
        slots = new.view(old.shape[0], old.shape[1], -1).zero_()
        slots[..., :old_width] = old
        return
    if new.ndim == 1:
        norm_weight = "norm" in name and name.endswith("weight")
        root = math.sqrt(len(old) / len(new))
        new.fill_(float(old.mean()) * root) if norm_weight else new.zero_()
        new[: len(old)] = old * root if norm_weight else old
        return
    if name == "multi_modal_projector.weight":  # [out, last state | intermediate states]
        width = new.shape[1] // (old.shape[1] // old_width)
        new[old.shape[0] :] = 0
        new[: len(old), :old_width] = old[:, :old_width]
        new[: len(old), width : width + old.shape[1] - old_width] = old[:, old_width:]
        return
    writes = ("patch_embedding", "embedding", "o_proj", "down_proj", "fc2")
    if any(part in name for part in writes):  # [residual channels, inputs]
        if "embed_tokens" in name or name.endswith("positional_embedding.embedding"):
            new.zero_()  # [rows, residual channels]
        else:
            new[old.shape[0] :] = 0
            new[:, old.shape[1] :] = 0
    new[tuple(slice(size) for size in old.shape)] = old


def _move_tokens(rows: Tensor, old: Chat, new: Chat) -> Tensor:
    """Rows of the old vocabulary in the order of the new one."""
    moved = rows.new_empty(new.num_ranks, rows.shape[1])
    for rank in range(new.num_ranks):
        pieces = old.encoding._encode_single_piece(new.encoding.decode_single_token_bytes(rank))
        moved[rank] = rows[pieces].mean(0)
    return torch.cat((moved, rows[old.num_ranks :]))


def _adapt_vision(old: dict[str, Tensor], config: VisionConfig) -> None:
    """Bring heads and units of the old vision layers to the sizes of the new ones, in place."""
    heads = OLD_HEADS
    names = [name for name in old if name.startswith("vision_model") and "self_attn" in name]
    prefixes = sorted({name[: name.index("self_attn")] for name in names})
    for prefix in prefixes:
        names = [f"{prefix}self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")]
        query, key, value = (old[name].unflatten(0, (heads, -1)) for name in names[:3])
        out = old[names[3]].unflatten(1, (heads, -1))
        pair = min(combinations(range(heads), 2), key=lambda p: float(_strength(value, out, p)))
        dim, size = config.head_dim, value.shape[1]
        parts = [torch.randn(config.attention_heads, dim, key.shape[2]) * 0.05 for _ in range(3)]
        new_out = torch.zeros(out.shape[0], config.attention_heads, dim)
        parts[0].zero_()
        others = [h for h in range(heads) if h not in pair]
        places = [(h, i, 0) for i, h in enumerate(others)]
        places += [(pair[0], len(others), 0), (pair[1], len(others), size)]
        for head, target, start in places:
            spot = (target, slice(start, start + size))
            parts[0][spot] = query[head] * math.sqrt(dim / size) * (0.7 if head in pair else 1)
            parts[1][spot], parts[2][spot] = key[head], value[head]
            new_out[:, target, start : start + size] = out[:, head]
        for name, part in zip(names[:3], parts, strict=True):
            old[name] = part.flatten(0, 1)
        old[names[3]] = new_out.flatten(1)
        first, second = old[f"{prefix}mlp.fc1.weight"], old[f"{prefix}mlp.fc2.weight"]
        strength = first.norm(dim=1) * second.norm(dim=0)
        keep = strength.topk(config.intermediate_size).indices.sort().values
        old[f"{prefix}mlp.fc1.weight"] = first[keep]
        old[f"{prefix}mlp.fc1.bias"] = old[f"{prefix}mlp.fc1.bias"][keep]
        old[f"{prefix}mlp.fc2.weight"] = second[:, keep]


def _strength(value: Tensor, out: Tensor, heads: tuple[int, int]) -> Tensor:
    """How much two heads write, the weaker one above all."""
    norms = torch.stack([(out[:, head] @ value[head]).norm() for head in heads])
    return norms.max() + 10 * norms.min()
