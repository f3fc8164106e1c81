"""What the rest of the program may ask of a family with its math: to make a model, and fill it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from mmchat.models.base import CompilableModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmchat.checkpoints.checkpoint import Checkpoint, Used
    from mmchat.checkpoints.mapped_file import TensorEntry
    from mmchat.models.base import ExportLimits, ExportProgram, Model, RunProgram
    from mmchat.models.family import Alpha
    from mmchat.models.prompt import Processor
    from mmchat.tokenizers.base import Tokenizer

C = TypeVar("C", contravariant=True)  # the family's config
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


class Programs(Protocol[C, M_in]):
    """A model as programs that are compiled ahead of time, in one format."""

    def export_programs(self, model: M_in, limits: ExportLimits) -> Sequence[ExportProgram]:
        """The programs of `model`, with example arguments on its device and in its dtype."""
        ...

    def model(
        self,
        config: C,
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
    """A family's math. Reading weights raises CheckpointError; models.hub_weights has the methods
    for weights that are named as the model's."""

    def model(self, config: C) -> M:
        """The model with random or, on the meta device, no weights."""
        ...

    def processor(self, config: C, tokenizer: Tokenizer, alpha: Alpha) -> Processor: ...

    def check_weights(
        self, checkpoint: Checkpoint, config: C, wanted: Collection[str] | None = None
    ) -> Mapping[str, TensorEntry]:
        """Compare names, shapes and dtypes with the model's; reads headers only.

        Those `wanted` must be there, all when None. Returns what the checkpoint holds, by the Hub's
        names.

        Raises CheckpointError with every difference, as OtherConfigError where it is known what
        the checkpoint was made for.
        """
        ...

    def iter_weights(
        self,
        checkpoint: Checkpoint,
        config: C,
        wanted: Collection[str] | None = None,
        used: Callable[[str], Used | None] = ...,
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hub name, tensor) for all or the `wanted` tensors, in the order of the files.

        All are checked before the first is read. A tensor may be a view of its file: copy it or
        keep it; what is written to it before the next is taken is lost. used: what the caller
        takes of a tensor; the rest may be anything. It takes all where that gives None.
        """
        ...

    def hub_entries(self, checkpoint: Checkpoint, config: C) -> list[TensorEntry]:
        """Hub name, shape and dtype of all that `iter_weights` gives, in its order."""
        ...

    def programs(self, format: Literal["aoti", "executorch"]) -> Programs[C, M]:
        """For one of Family.program_formats."""
        ...
