"""A checkpoint some of whose tensors are computed when they are read: unpacked, merged, joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.checkpoints.checkpoint import Checkpoint, Used
from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]


@dataclass(frozen=True)
class Computed:
    """A tensor that is not stored as it is wanted.

    entry: what readers are told of it. sources: names of the stored tensors that it is made of.
    compute: makes it, reading each of them; the result has the shape and dtype of `entry`.
    """

    entry: TensorEntry
    sources: tuple[str, ...]
    compute: Callable[[Read], Tensor]


class ComputedCheckpoint(Checkpoint):
    """`stored` with `tensors` in place of their sources, in the order of the files. It closes it.

    What is neither computed nor a source is read as before. Raises CheckpointError where a tensor
    is both computed and stored.
    """

    def __init__(self, stored: Checkpoint, tensors: Iterable[Computed], remark: str = "") -> None:
        self._stored = stored
        self._own = {tensor.entry.name: tensor for tensor in tensors}
        made = {t.sources[0]: t.entry for t in self._own.values()}
        hidden = {name for tensor in self._own.values() for name in tensor.sources}
        if twice := next((n for n in self._own if n in stored.entries and n not in hidden), None):
            raise CheckpointError(
                f"{shown(stored.files[0])}: tensor {shown(twice)} is there as it is, and packed as"
                " well; download it again"
            )
        entries = [
            made.get(name) or (None if name in hidden else entry)
            for name, entry in stored.entries.items()
        ]
        self.entries = {entry.name: entry for entry in entries if entry}
        self.computed = {n: t for n, t in stored.computed.items() if n not in hidden} | self._own
        self.format = stored.format
        self.files, self.total_bytes = stored.files, stored.total_bytes
        self.remarks = (*stored.remarks, remark) if remark else stored.remarks

    def read(self, name: str, used: Used | None = None) -> Tensor:
        tensor = self._own.get(name)
        return tensor.compute(self._stored.read) if tensor else self._stored.read(name, used)

    def release(self, name: str) -> None:
        tensor = self._own.get(name)
        for source in tensor.sources if tensor else (name,):
            self._stored.release(source)

    def close(self) -> None:
        self._stored.close()
