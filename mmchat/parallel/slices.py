"""Which part of each weight a rank holds: whole heads, and equal blocks of hidden units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from mmchat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # hidden units that stay together: no group of a quantised weight is longer


@dataclass(frozen=True)
class Cut:
    """How a weight [N, K] is shared. parts: sizes of what lies side by side along `axis` and is
    shared each by itself, such as queries, keys and values in one.

    axis: 0, rows: each rank has some outputs, `gathered` by all or by the first afterwards, or used
    as they are. 1, columns: each rank has some inputs, and the products are summed. unit: how many
    rows or columns stay together. shared: what people call the units, which each rank has as many
    of as any other; empty where one may have more.
    """

    axis: Literal[0, 1]
    parts: tuple[int, ...]
    unit: int = 1
    gathered: Literal["", "all", "first"] = ""
    shared: str = ""

    @property
    def columns(self) -> Cut:
        """That of a weight which takes in what one with this cut gives."""
        return replace(self, axis=1)

    def spans(self, rank: int, ranks: int) -> list[tuple[int, int]]:
        """(first, end) of the rank's share of each part, along the whole axis."""
        found, offset = [], 0
        for size in self.parts:
            unit = self.unit if size // self.unit >= ranks else 1
            begin, end = (unit * (size // unit * at // ranks) for at in (rank, rank + 1))
            found.append((offset + begin, offset + end))
            offset += size
        return found

    def size(self, rank: int, ranks: int) -> int:
        return sum(end - begin for begin, end in self.spans(rank, ranks))


# Pattern of the names of layers, or of tensors that are no layer's -> their cut. What matches none
# is held whole by every rank.
Cuts = Mapping[str, Cut]


def heads(count: int, size: int, kind: str = "heads") -> Cut:
    """`count` heads of `size`, as rows."""
    return Cut(0, (count * size,), size, shared=kind)


def hidden(size: int) -> Cut:
    """Hidden units of a feed-forward network, as rows."""
    return Cut(0, (size,), math.gcd(size, BLOCK))


def together(*cuts: Cut) -> Cut:
    """Of layers whose rows are joined."""
    parts = tuple(size for cut in cuts for size in cut.parts)
    return Cut(cuts[0].axis, parts, math.gcd(*(cut.unit for cut in cuts)), shared=cuts[0].shared)


def decoder_cuts(prefix: str, text: Any) -> dict[str, Cut]:
    """The layers of nn.decoder and nn.mlp.GatedMLP below `prefix`, and their `lm_head`."""
    query = heads(text.num_attention_heads, text.head_dim)
    key = heads(text.num_key_value_heads, text.head_dim, "key and value heads")
    inner = hidden(text.intermediate_size)
    return {
        f"{prefix}*_attn.q_proj": query,
        f"{prefix}*_attn.[kv]_proj": key,
        f"{prefix}*_attn.qkv_proj": together(query, key, key),
        f"{prefix}*_attn.o_proj": query.columns,
        f"{prefix}*.gate_proj": inner,
        f"{prefix}*.up_proj": inner,
        f"{prefix}*.gate_up_proj": together(inner, inner),
        f"{prefix}*.down_proj": inner.columns,
        f"{prefix}*lm_head": Cut(0, (text.vocab_size,), gathered="first"),
    }


def encoder_cuts(prefix: str, count: int, size: int, inner: int) -> dict[str, Cut]:
    """The layers of a ViT below `prefix`: `count` heads of `size`, `inner` hidden units."""
    own, units = heads(count, size, "vision heads"), hidden(inner)
    return {
        f"{prefix}*.self_attn.[qkv]_proj": own,
        f"{prefix}*.self_attn.o*_proj": own.columns,
        f"{prefix}*.mlp.fc1": units,
        f"{prefix}*.mlp.fc2": units.columns,
    }


def shared_counts(cuts: Cuts) -> dict[str, int]:
    """What each rank has as many of as any other, by its name for people: heads of all kinds."""
    return {cut.shared: cut.parts[0] // cut.unit for cut in cuts.values() if cut.shared}


def check_ranks(name: str, ranks: int, cuts: Cuts) -> None:
    """Raises UsageError unless `ranks` divides the heads of a model whose cuts these are."""
    counts = shared_counts(cuts)
    if not counts:
        raise UsageError(f"{name}: its family is not shared by ranks yet; leave out --parallel")
    common = math.gcd(*counts.values())
    if common % ranks == 0:
        return
    odd = next(what for what, count in counts.items() if count % ranks)
    able = [str(n) for n in range(2, common + 1) if common % n == 0]
    use = f"use {' or '.join(able)}" if able else "leave out --parallel"
    raise UsageError(f"--parallel {ranks}: {name} has {counts[odd]} {odd}; {use}")


@dataclass(frozen=True)
class Shares:
    """What one of `ranks` ranks holds of a model whose cuts these are."""

    cuts: Cuts
    rank: int
    ranks: int

    def cut(self, name: str) -> Cut | None:
        """Of a layer, or of a tensor by its own name or its layer's; None: held whole."""
        names = (name, name.rpartition(".")[0])
        for pattern, cut in self.cuts.items():
            if any(fnmatchcase(one, pattern) for one in names):
                return cut
        return None

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The rank's share of a whole tensor: a weight, a bias, scales, or what is not cut.

        Rows are a view of it, columns a copy. A bias that is added to a sum is that of rank 0.
        """
        cut = self.cut(name)
        if cut is None:
            return tensor
        spans = cut.spans(self.rank, self.ranks)
        if cut.axis == 0:
            return _taken(tensor, 0, spans)
        if tensor.dim() == 1:  # one scale a row, or a bias
            is_bias = name.endswith(".bias") and self.rank > 0
            return tensor.new_zeros(tensor.shape) if is_bias else tensor
        packed, whole = tensor.shape[1], sum(cut.parts)  # fewer: two levels a byte, or a group
        return _taken(tensor, 1, [(a * packed // whole, b * packed // whole) for a, b in spans])

    def cuts_columns(self, name: str) -> bool:
        """Whether the rank holds some of a weight's columns, whose scales are of whole rows."""
        cut = self.cut(name)
        return cut is not None and cut.axis == 1

    def splits(self, name: str, rows: int, columns: int) -> bool:
        """Whether so many rows or columns of a weight, which are one, would be on two ranks."""
        cut = self.cut(name)
        size = (rows, columns)[cut.axis] if cut else 1
        return cut is not None and any(
            at % size for span in cut.spans(self.rank, self.ranks) for at in span
        )


def share_shape(shares: Shares, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the rank's share of a tensor."""
    cut = shares.cut(name)
    if cut is None or (cut.axis == 1 and len(shape) == 1):
        return tuple(shape)
    own = list(shape)
    own[cut.axis] = cut.size(shares.rank, shares.ranks)
    return tuple(own)


def _taken(tensor: Tensor, axis: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = [tensor.narrow(axis, begin, end - begin) for begin, end in spans]
    if len(parts) == 1:
        return parts[0].contiguous()
    import torch

    return torch.cat(parts, axis)
