"""Weights of checkpoints whose tensors are named as those of the model, as on the Hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NoReturn, TypeVar

from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.checkpoints.verify import check_entries
from mmchat.errors import CheckpointError, ExportError

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.checkpoints.checkpoint import Checkpoint, Used

C = TypeVar("C")  # the family's config


class HubWeights(ABC, Generic[C]):
    """All of models.build.Build but `model` and `processor`.

    For a family without programs whose modules carry the Hub's names. label: its name for people.
    shapes: those of Family.shapes.
    """

    label: ClassVar[str]

    @staticmethod
    @abstractmethod
    def shapes(config: C) -> Mapping[str, tuple[int, ...]]: ...

    def entries(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """What it holds of the model, by the model's names, where there are other spellings."""
        return entries_by_name(checkpoint, lambda name: name)

    def check_weights(
        self, checkpoint: Checkpoint, config: C, wanted: Collection[str] | None = None
    ) -> dict[str, TensorEntry]:
        entries = self.entries(checkpoint)
        shapes = self.shapes(config)
        check_entries(checkpoint, entries, shapes, shapes if wanted is None else wanted)
        return entries

    def iter_weights(
        self,
        checkpoint: Checkpoint,
        config: C,
        wanted: Collection[str] | None = None,
        used: Callable[[str], Used | None] = lambda _: None,
    ) -> Iterator[tuple[str, Tensor]]:
        entries = self.check_weights(checkpoint, config, wanted)
        return read_entries(checkpoint, entries, entries if wanted is None else wanted)

    def programs(self, format: Literal["aoti", "executorch"]) -> NoReturn:
        raise ExportError(
            f"{self.label} cannot be exported as {format} programs yet; --format safetensors stores"
            " its weights as they are loaded"
        )

    def hub_entries(self, checkpoint: Checkpoint, config: C) -> list[TensorEntry]:
        entries = self.check_weights(checkpoint, config)
        return [replace(entry, name=name) for name, entry in entries.items()]


def other_side(positions: TensorEntry | None, tokens: int, patch_size: int) -> int | None:
    """Side in pixels of the pictures that a table of positions is for, if it has not `tokens` rows.

    It has a row for each patch of a square, and one more; None for what is no such table.
    """
    if positions is None or len(positions.shape) != 2 or positions.shape[0] == tokens:
        return None
    side = isqrt(max(positions.shape[0] - 1, 0))
    return side * patch_size if side and side**2 + 1 == positions.shape[0] else None


def entries_by_name(
    checkpoint: Checkpoint, hub_name: Callable[[str], str | None]
) -> dict[str, TensorEntry]:
    """What the checkpoint holds by the model's names, in the order of the files.

    What hub_name gives no name is passed over.

    Raises CheckpointError if two tensors have one name.
    """
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.entries.items():
        hub = hub_name(name)
        if hub is None:
            continue
        if hub in entries:
            raise CheckpointError(
                f"{shown(entry.file)}: tensors {shown(entries[hub].name)} and {shown(name)} are two"
                " spellings of the same"
            )
        entries[hub] = entry
    return entries


def read_entries(
    checkpoint: Checkpoint, entries: Mapping[str, TensorEntry], wanted: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """(the model's name, tensor) of the `wanted`; each is given back when the next is taken."""
    for name, entry in entries.items():
        if name in wanted:
            yield name, checkpoint.rows(entry.name)
            checkpoint.release(entry.name)
