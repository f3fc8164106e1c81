"""What the rest of the program may ask of a family with its math: to make a model, and fill it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from mmchat.checkpoints.mapped_file import TensorEntry, shown
from mmchat.checkpoints.verify import check_entries
from mmchat.errors import CheckpointError, ExportError
from mmchat.models.base import CompilableModel
from mmchat.models.family import OtherConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmchat.checkpoints.checkpoint import Checkpoint, Used
    from mmchat.models.base import ExportLimits, ExportProgram, Model, RunProgram
    from mmchat.models.family import Alpha
    from mmchat.models.prompt import Processor
    from mmchat.tokenizers.base import Tokenizer

C = TypeVar("C")  # the family's config
C_in = TypeVar("C_in", contravariant=True)
M = TypeVar("M")  # the family's model
M_in = TypeVar("M_in", contravariant=True)


class FamilyModel(CompilableModel, Protocol):
    """A model that is built empty and then filled with weights; a torch.nn.Module."""

    remarks: list[str]  # what is unusual about the weights, for those who ask for details
    ranks: int  # processes that share it, each with as many of the heads; 1 when it is built
    kv_dtype: torch.dtype | None  # of the keys and values of its caches; None: the model's

    def weight_names(self, *, text_only: bool) -> Collection[str]:
        """Names of the weights to load; text_only: those that a text without pictures needs."""
        ...

    def linear_parts(self) -> Mapping[str, str]:
        """Name of each linear layer -> its part: "text", "head" or "vision"."""
        ...

    def fuse_projections(self) -> None:
        """Join linear layers that read the same input, where they do."""
        ...

    def finish_loading(self, device: torch.device) -> None:
        """Compute what is in no checkpoint and what follows from the weights, which are there."""
        ...

    # of torch.nn.Module

    def get_submodule(self, target: str) -> nn.Module: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...

    def eval(self) -> nn.Module: ...


class Programs(Protocol[C_in, M_in]):
    """A model as programs that are compiled ahead of time, in one format."""

    def export_programs(self, model: M_in, limits: ExportLimits) -> Sequence[ExportProgram]:
        """The programs of `model`, with example arguments on its device and in its dtype."""
        ...

    def model(
        self,
        config: C_in,
        limits: ExportLimits,
        device: torch.device,
        dtype: torch.dtype,
        run: RunProgram,
        weights: Mapping[str, Tensor],
    ) -> Model:
        """The model that calls them, for one row at a time.

        weights: what they read; empty where they hold them.
        """
        ...


class Build(Protocol[C, M]):
    """A family's math. Reading weights raises CheckpointError.

    model: makes it, with random or, on the meta device, no weights. What has a body here is for a
    family without programs whose modules carry the Hub's names. label: its name for people.
    """

    label: str
    model: Callable[[C], M]
    processor: Callable[[C, Tokenizer, Alpha], Processor]

    @staticmethod
    @abstractmethod
    def shapes(config: C) -> Mapping[str, tuple[int, ...]]:
        """Those of Family.shapes."""

    @staticmethod
    def hub_name(name: str) -> str | None:
        """That of Family.hub_name, where there are other spellings."""
        return name

    def entries(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """What it holds of the model, by the model's names."""
        return entries_by_name(checkpoint, self.hub_name)

    def check_weights(
        self, checkpoint: Checkpoint, config: C, wanted: Collection[str] | None = None
    ) -> Mapping[str, TensorEntry]:
        """Compare names, shapes and dtypes with the model's; reads headers only.

        Those `wanted` must be there, all when None. Returns what the checkpoint holds, by the Hub's
        names.

        Raises CheckpointError with every difference, as OtherConfigError where it is known what
        the checkpoint was made for.
        """
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
        """(Hub name, tensor) for all or the `wanted` tensors, in the order of the files.

        All are checked before the first is read. A tensor may be a view of its file: copy it or
        keep it; what is written to it before the next is taken is lost. used: what the caller
        takes of a tensor; the rest may be anything. It takes all where that gives None.
        """
        entries = self.check_weights(checkpoint, config, wanted)
        return read_entries(checkpoint, entries, entries if wanted is None else wanted)

    def programs(self, format: Literal["aoti", "executorch"]) -> Programs[C, M]:
        """For one of Family.program_formats."""
        raise ExportError(
            f"{self.label} cannot be exported as {format} programs yet; --format safetensors stores"
            " its weights as they are loaded"
        )

    def hub_entries(self, checkpoint: Checkpoint, config: C) -> list[TensorEntry]:
        """Hub name, shape and dtype of all that `iter_weights` gives, in its order."""
        entries, shapes = self.check_weights(checkpoint, config), self.shapes(config)
        return [replace(entry, name=name, shape=shapes[name]) for name, entry in entries.items()]


def check_picture_size(
    positions: TensorEntry | None, config: Any, tokens: int, complaint: str
) -> None:
    """Raises OtherConfigError if a table of positions is for squares of another side.

    It has a row for each patch of a square, and one more: `tokens` in the model of this config.
    complaint: what people are told, with {} for the side.
    """
    if positions is None or len(positions.shape) != 2 or positions.shape[0] == tokens:
        return
    vision, side = config.vision_config, isqrt(max(positions.shape[0] - 1, 0))
    if side and side**2 + 1 == positions.shape[0]:
        found = side * vision.patch_size
        raise OtherConfigError(
            f"{shown(positions.file)}: {complaint.format(found)}",
            replace(config, vision_config=replace(vision, image_size=found)),
        )


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
