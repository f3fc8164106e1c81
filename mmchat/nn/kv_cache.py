"""Keys and values of past positions, and how a batch of rows attends to them.

A layer gets an object that stores the keys and values of the new positions and attends to all of
them: `attend(query [N, H, D], key [N, G, D], value [N, G, D]) -> [N, H·D]`. PastRows is for rows
of any lengths, PastSteps is made of tensors alone and is what compiled layers take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmchat.nn.attention import KeyValue, Row, attend, attend_rows, held
from mmchat.quant.kernels.layout import SCALE_BYTES


class Past(Protocol):
    """Stores new positions of a self-attention layer and attends to them and those before."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class LayerCache:
    """Preallocated keys and values of one self-attention layer: `rows[slot]` is two [1, G, L, D].

    fixed: all slots lie in two tensors [slots, G, L, D] and grow together, so that one step can
    read all of them; else each has its own and is as long as it needs to be. dtype: in int8 each
    key and value has a scale, and takes D + 4 bytes (nn.attention.held).
    """

    @torch.inference_mode(False)  # tensors of one kind, whoever makes them: see torch.compile
    def __init__(
        self,
        slots: int,
        groups: int,
        capacity: int,
        head_dim: int,
        *,
        fixed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.fixed = fixed
        width = head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
        self.whole: list[KeyValue] = []  # one for all slots, or one a slot
        for _ in range(1 if fixed else slots):
            shape = (slots if fixed else 1, groups, capacity, width)
            # not torch.empty: what is masked is multiplied by 0, and NaN would stay
            key = torch.zeros(*shape, dtype=dtype, device=device)
            self.whole.append((key, torch.zeros_like(key)))

    def row(self, slot: int) -> KeyValue:
        if not self.fixed:
            return self.whole[slot]
        key, value = self.whole[0]
        return key[slot, None], value[slot, None]

    def capacity(self, slot: int) -> int:
        return self._of(slot)[0].shape[2]

    def grow(self, slot: int, capacity: int) -> None:
        """Make room for `capacity` positions; what is stored stays, also if memory runs out."""
        if capacity > self.capacity(slot):
            self._move(slot, capacity)

    def shrink(self, slot: int, capacity: int) -> None:
        """Give back the room beyond `capacity` positions."""
        if capacity < self.capacity(slot):
            self._move(slot, capacity)

    def clear(self, slot: int) -> None:
        """Put zeros where the slot's keys and values were."""
        for stored in self.row(slot):
            stored.zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` begin with the first `length` positions of `source`."""
        for given, taken in zip(self.row(source), self.row(target), strict=True):
            taken[:, :, :length] = given[:, :, :length]

    def _of(self, slot: int) -> KeyValue:
        return self.whole[0 if self.fixed else slot]

    @torch.inference_mode(False)
    def _move(self, slot: int, capacity: int) -> None:
        moved = []
        for old in self._of(slot):
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            kept = min(capacity, old.shape[2])
            new[:, :, :kept] = old[:, :, :kept]
            moved.append(new)
        self.whole[0 if self.fixed else slot] = (moved[0], moved[1])


@dataclass(frozen=True)
class Spans:
    """Which positions the rows of a batch read, for all layers: (slot, start, count)."""

    rows: tuple[tuple[int, int, int], ...]

    def positions(self, device: torch.device) -> Tensor:
        """[N]"""
        rows = [torch.arange(start, start + n, device=device) for _, start, n in self.rows]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class PastRows:
    """The past of rows of any lengths, in one layer.

    Differentiable for rows that start at 0, but in int8: there the rounded keys and values are
    read at once, so that a prompt in pieces gives what it gives as a whole.
    """

    def __init__(self, layer: LayerCache, spans: Spans) -> None:
        self._layer = layer
        self._spans = spans

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, at = [], 0
        for slot, start, count in self._spans.rows:
            stored = self._layer.row(slot)
            new = [heads_first(held(x[at : at + count], stored[0].dtype)) for x in (key, value)]
            end, at = start + count, at + count
            for kept, fresh in zip(stored, new, strict=True):
                kept[:, :, start:end] = fresh.detach()  # the cache outlives the graph of gradients
            if start == 0:  # the new keys themselves: gradients flow through them
                key_value = new[0], new[1]
            else:
                key_value = stored[0][:, :, :end], stored[1][:, :, :end]
            rows.append(Row(count, *key_value, is_causal=count > 1))
        return attend_rows(query, rows).flatten(1)


class PastSteps(NamedTuple):
    """The past of R rows that read S positions each, in one layer, as tensors.

    key, value: [R, G, L, D], written in place. positions: [R, S], where the new ones go. mask:
    [R, 1, S, N], True up to and including the position; the first N positions are read.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, count = self.positions.shape
        if key.requires_grad:  # the cache would keep the graph of every step
            key, value = key.detach(), value.detach()
        for stored, new in zip(self[:2], (key, value), strict=True):
            new = held(new, stored.dtype)
            if rows == 1:  # faster than by two indices
                stored.index_copy_(2, self.positions[0], heads_first(new))
            else:
                row = torch.arange(rows, device=new.device)[:, None]
                stored[row, :, self.positions] = new.unflatten(0, (rows, count))
        read = [stored[:, :, : self.mask.shape[-1]] for stored in self[:2]]
        query = query.unflatten(0, (rows, count)).transpose(1, 2)
        attended = attend(query, *read, mask=self.mask).transpose(1, 2)
        return attended.flatten(2).flatten(0, 1)


def heads_first(x: Tensor) -> Tensor:
    """[N, H, D] -> [1, H, N, D]"""
    return x.transpose(0, 1)[None]


def causal_mask(positions: Tensor, length: int) -> Tensor:
    """positions: [R, S] -> [R, 1, S, length], True up to and including the position."""
    columns = torch.arange(length, device=positions.device)
    return (columns <= positions[..., None])[:, None]


def past_steps(cached: Sequence[KeyValue], positions: Tensor, length: int) -> list[PastSteps]:
    """cached: [R, G, L, D] twice for each layer. positions: [R, S]. length: positions that hold a
    row once these are written."""
    mask = causal_mask(positions, length)
    return [PastSteps(key, value, positions, mask) for key, value in cached]
