"""Give a model the weights of a checkpoint: checked, quantised if asked, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mmchat.catalog.find import ModelParams, params_for_tile_size
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.errors import CheckpointError, MmchatError
from mmchat.estimate.memory import Setup, check_memory, used_in_place
from mmchat.hardware.memory import available_memory
from mmchat.hardware.placement import Placement
from mmchat.nn.linear import Linear, set_formats
from mmchat.nn.shapes_only import shapes_only
from mmchat.progress import ProgressCallback
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.schemes import Plan


def load_weights(
    files: Checkpoint,
    setup: Setup,
    placement: Placement,
    plan: Plan,
    progress: ProgressCallback | None,
) -> Any:
    """Build on the meta device, then give each parameter its tensor, one at a time.

    A layer that is quantised takes its weights rounded, so that no more than one of them is in
    memory as it was. Raises MemoryError_ before anything is allocated.
    """
    in_place = used_in_place(files, str(placement.dtype).removeprefix("torch."))
    check_memory(replace(setup, from_file=in_place), available_memory(placement.device))
    params, family = setup.params, setup.params.family
    with shapes_only():
        model = family.resolve("model")(params.config)
    model.requires_grad_(False).eval()
    wanted = model.weight_names(text_only=setup.text_only)
    set_formats(model, plan)
    try:
        tensors = family.resolve("weights").iter_weights(files, params.config, wanted)
        for done, (name, tensor) in enumerate(tensors, start=1):
            _assign(model, name, tensor, placement)
            if progress:
                progress("weights", done, len(wanted))
    except CheckpointError as error:
        raise _with_fitting_params(error, params) from None
    stays_in_file = plan.scheme == "none" and placement.device.type == "cpu"
    if not stays_in_file:
        model.fuse_projections()
    model.finish_loading(placement.device)
    return model


def _assign(model: torch.nn.Module, name: str, tensor: torch.Tensor, placement: Placement) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last == "weight" and isinstance(module, Linear) and module.format != PLAIN:
        module.quantize(tensor.to(placement.device))
        return
    tensor = tensor.to(placement.device, placement.dtype)
    setattr(module, last, torch.nn.Parameter(tensor, requires_grad=False))


def _with_fitting_params(error: CheckpointError, params: ModelParams) -> MmchatError:
    """Add which params file fits, when the checkpoint's tile size is not that of the params."""
    tile_size = getattr(error, "tile_size", None)
    fitting = params_for_tile_size(tile_size, params) if tile_size else None
    return CheckpointError(f"{error}; {fitting} fits") if fitting else error
