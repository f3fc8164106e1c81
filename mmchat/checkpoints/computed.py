"""A checkpoint some of whose tensors are computed when they are read: unpacked, merged, joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mmchat.checkpoints.checkpoint import Checkpoint, Used
from mmchat.checkpoints.codes import Codes
from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROWS = 64  # spans begin at multiples, where no byte and no block is cut


@dataclass(frozen=True)
class Computed:
    """A tensor that is not stored as it is wanted.

    entry: what readers are told of it. sources: names of the stored tensors that it is made of.
    compute: reads them and makes it, of the shape and dtype of `entry`.
    """

    entry: TensorEntry
    sources: tuple[str, ...]
    compute: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A matrix [N, K] in place of its tensor, as far as loading and export use that.

    entry, sources: as of Computed.
    rows: reads rows `begin` to `end`, in entry.dtype. codes: the same where a format of ours may
    hold them. ordered: the weight with its rows in another order, where files need that.
    """

    entry: TensorEntry
    sources: tuple[str, ...]
    rows: Callable[[int, int], Tensor]
    codes: Callable[[int, int], Codes] | None = None
    ordered: Callable[[Tensor], PackedWeight] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor | PackedWeight:
        if isinstance(rows, slice):
            return self.rows(*rows.indices(len(self))[:2])
        assert self.ordered  # noqa: S101
        return self.ordered(rows)

    def compute(self) -> Tensor:
        import torch

        return self.to(getattr(torch, self.entry.dtype))

    def to(self, dtype: torch.dtype) -> Tensor:
        import torch

        whole = torch.empty(self.shape, dtype=dtype)
        for begin, end in spans(self.shape):
            whole[begin:end] = self.rows(begin, end)
        return whole


def spans(shape: tuple[int, ...], numbers: int = 2**18) -> Iterator[tuple[int, int]]:
    """Beginning and end of rows of a matrix that are taken together: so many numbers, which stay
    in a cache while they are unpacked."""
    count, columns = shape
    step = max(numbers // columns // _ROWS, 1) * _ROWS
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


class ComputedCheckpoint(Checkpoint):
    """`stored` with `tensors` in place of their sources, in the order of the files. It closes it.

    What is neither computed nor a source is read as before. Raises CheckpointError where a tensor
    is both computed and stored.
    """

    def __init__(
        self, stored: Checkpoint, tensors: Iterable[Computed | PackedWeight], remark: str = ""
    ) -> None:
        self._stored = stored
        self.computed = own = {tensor.entry.name: tensor for tensor in tensors}
        made = {tensor.sources[0]: tensor.entry for tensor in own.values()}
        hidden = {name for tensor in own.values() for name in tensor.sources}
        if twice := next((n for n in own if n in stored.entries and n not in hidden), None):
            raise CheckpointError(
                f"{shown(stored.files[0])}: tensor {shown(twice)} is there as it is, and packed as"
                " well; download it again"
            )
        entries = [
            made.get(name) or (None if name in hidden else entry)
            for name, entry in stored.entries.items()
        ]
        self.entries = {entry.name: entry for entry in entries if entry}
        self.format = stored.format
        self.files, self.total_bytes = stored.files, stored.total_bytes
        self.remarks = (*stored.remarks, remark) if remark else stored.remarks

    def read(self, name: str, used: Used | None = None) -> Tensor:
        tensor = self.computed.get(name)
        return tensor.compute() if tensor else self._stored.read(name, used)

    def rows(self, name: str) -> Tensor:
        """The tensor, or a PackedWeight in its place, so that it need not be whole in memory."""
        tensor = self.computed.get(name)
        return cast("Tensor", tensor) if isinstance(tensor, PackedWeight) else self.read(name)

    def release(self, name: str) -> None:
        tensor = self.computed.get(name)
        for source in tensor.sources if tensor else (name,):
            self._stored.release(source)

    def close(self) -> None:
        self._stored.close()
