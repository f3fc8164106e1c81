"""Load weights that `mmchat export --format safetensors` wrote: mapped as they will be used.

They are in the dtype and the quantisation scheme of the record, with the projections joined as a
loaded model has them, so nothing is computed and on the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmchat.errors import CheckpointError, quoted
from mmchat.progress import ProgressCallback

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.catalog.params_file import ModelParams
    from mmchat.checkpoints.checkpoint import Checkpoint
    from mmchat.quant.schemes import Plan

_SHOWN = 5  # differences that a message names


def load_saved(
    files: Checkpoint,
    params: ModelParams,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    text_only: bool,
    progress: ProgressCallback | None = None,
) -> Any:
    """The model of `params` with the stored tensors. progress("weights", done, of tensors).

    dtype: of all that is not quantised. Raises CheckpointError with the differences.
    """
    from mmchat.nn.linear import set_formats
    from mmchat.nn.shapes_only import shapes_only

    with shapes_only():
        model = params.family.resolve("model")(params.config)
        set_formats(model, plan)
        if any(".qkv_proj." in name for name in files.entries):
            model.fuse_projections()
    model.requires_grad_(False).eval()
    wanted = model.weight_names(text_only=text_only)
    buffers = dict(model.named_buffers())  # what is quantised, its scales included
    expected = {
        name: (tuple(like.shape), buffers[name].dtype if name in buffers else dtype)
        for name, like in model.state_dict().items()
    }
    _check(files, expected, wanted)
    stored = [name for name in files.entries if name in wanted]
    for done, name in enumerate(stored, start=1):
        _assign(model, name, files.read(name).to(device))
        if progress:
            progress("weights", done, len(stored))
    model.finish_loading(device)
    return model


def _check(
    files: Checkpoint,
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    wanted: set[str],
) -> None:
    faults = [f"{quoted(n)} is missing" for n in sorted(wanted - files.entries.keys())]
    faults += [f"{quoted(n)} is unknown" for n in sorted(files.entries.keys() - expected.keys())]
    for name in sorted(wanted & files.entries.keys()):
        entry, (shape, kind) = files.entries[name], expected[name]
        dtype = str(kind).removeprefix("torch.")
        if (entry.shape, entry.dtype) != (shape, dtype):
            wants = f"{list(shape)} {dtype}"
            faults.append(f"{quoted(name)} is {list(entry.shape)} {entry.dtype}, expected {wants}")
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(
            f"{quoted(files.files[0], 300)}: {'; '.join(faults[:_SHOWN])}{more}; export it again"
        )


def _assign(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    import torch

    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    setattr(module, last, tensor)
