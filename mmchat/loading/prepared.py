"""What is known of a model before its weights are read: where, in which form, whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.adapter import Adapters
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.manifest import ExportRecord
from mmchat.estimate.memory import check_memory, used_in_place
from mmchat.hardware.memory import available_memory
from mmchat.hardware.placement import Placement
from mmchat.loading.options import LoadOptions
from mmchat.loading.packed import as_packed
from mmchat.quant.formats.base import Format
from mmchat.quant.kernels import native
from mmchat.quant.schemes import find_scheme

if TYPE_CHECKING:
    from mmchat.parallel.group import Group

_COMPARED_NUMBERS = 65_536  # of a tensor that is compared between ranks


@dataclass(frozen=True)
class Prepared:
    """Checked files and what is made of them, before weights are read.

    exported: how the files were made. adapters: are merged into what is no export. notices: takes
    what is to be said of the model. formats, memory: as in loader.Running.
    """

    files: Checkpoint
    spec: ModelSpec
    options: LoadOptions
    placement: Placement
    exported: ExportRecord | None
    adapters: Adapters
    formats: Mapping[str, Format] | None = None
    notices: list[str] = field(default_factory=list)
    memory: int | None = None

    @property
    def identity(self) -> str:
        """Equal for what may be shared: the same weights, in the same form."""
        entries = self.files.entries.values()
        options, place = self.options, self.placement
        said = [
            self.spec.config, options.quantize, options.quantize_keep, options.text_only,
            place.dtype, place.device.type, self.exported, self.adapters.remarks,
            [(one.name, one.shape, one.dtype) for one in entries],
        ]  # fmt: skip
        found = sha256(repr(said).encode())
        for one in entries:  # norms and gates tell one training from another
            if one.numel <= _COMPARED_NUMBERS:
                numbers = self.files.read(one.name).contiguous().flatten()  # also of one alone
                found.update(numbers.view(torch.uint8).numpy().data)
        return found.hexdigest()


def prepare(
    files: Checkpoint,
    spec: ModelSpec,
    options: LoadOptions,
    exported: ExportRecord | None,
    adapters: Adapters,
    group: Group | None = None,
) -> Prepared:
    """Refused before anything is allocated, if it does not fit into memory. group: of the ranks
    that share the model."""
    placement = placement_of(spec, options, as_exported=exported is not None)
    if group:
        placement = replace(placement, device=group.device_of(placement.device))
    options, formats, others = as_packed(files, spec, options, placement)
    options = replace(options, quantize=options.scheme(spec, placement))
    notices = prepare_kernels(placement, options)
    dtype = str(placement.dtype).removeprefix("torch.")
    in_place = exported is not None or (not adapters.all and used_in_place(files, dtype))
    setup = options.setup(spec, placement, from_file=in_place, others=others)
    available = available_memory(placement.device)
    if group and available is not None and placement.device.type == "cpu":
        available //= group.ranks_here
    need = check_memory(setup, available)
    memory = None if available is None else available - need.weights - need.working
    return Prepared(files, spec, options, placement, exported, adapters, formats, notices, memory)


def placement_of(spec: ModelSpec, options: LoadOptions, *, as_exported: bool) -> Placement:
    """Where the model runs. Raises DeviceError, also where it cannot multiply the weights."""
    placement = options.placement(spec)
    find_scheme(options.scheme(spec, placement)).check_device(placement.device)
    return replace(placement, reason="as exported") if as_exported else placement


def prepare_kernels(placement: Placement, options: LoadOptions) -> list[str]:
    """Compile the kernels for the CPU, where the model runs there, before anything is timed.

    Returns what to tell the user where there are none and the weights ask for them.
    """
    if placement.device.type != "cpu":
        return []
    native.prepare(options.progress)  # float32 takes them too: for pictures and long prompts
    is_rounded = options.quantize != "none" or options.kv != "auto"
    is_asked = is_rounded or placement.dtype == torch.bfloat16
    if not is_asked or native.library() or not native.is_wanted():
        return []
    return [f"slower than it could be, on torch's own kernels: {native.reason()}"]
