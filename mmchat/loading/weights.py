"""Give a model its weights, one tensor at a time: of a checkpoint, or as an export stored them.

Those of a checkpoint are translated, converted and, where a scheme asks for it, rounded. Those of
`mmchat export --format safetensors` lie as a loaded model has them, projections joined, so nothing
is computed, and on the CPU nothing is copied but what is brought into another order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmchat.catalog.known import params_file_for
from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.adapter import Adapters
from mmchat.checkpoints.checkpoint import Checkpoint, Used
from mmchat.checkpoints.computed import PackedWeight
from mmchat.checkpoints.verify import check_entries
from mmchat.errors import CheckpointError, MmchatError
from mmchat.hardware.placement import Placement
from mmchat.loading.packed import AddedError, fill
from mmchat.loading.prepared import Prepared
from mmchat.loading.shares import check_groups, cut_rounded
from mmchat.models.build import FamilyModel
from mmchat.models.family import OtherConfigError
from mmchat.nn.linear import Linear, set_formats
from mmchat.nn.shapes_only import shapes_only
from mmchat.parallel.slices import Shares


def load_weights(
    prepared: Prepared,
    *,
    repack: bool = True,
    shares: Shares | None = None,
    other: FamilyModel | None = None,
    changed: Collection[str] = (),
) -> FamilyModel:
    """Build the model on the meta device and fill it. repack: as in loader.load. shares: what this
    process holds of it. other: the same model but for the tensors that are `changed`; all that is
    equal is shared with it.

    A layer that is quantised takes its weights rounded, so that no more than one of them is in
    memory as it was. options.progress is told ("weights", done, of tensors). Raises
    CheckpointError with the differences, before anything is read.
    """
    p, files, spec, options = prepared, prepared.files, prepared.spec, prepared.options
    device, record = p.placement.device, p.exported
    scheme, kind = (record.scheme, record.device) if record else (options.quantize, device.type)
    joins = _joins(scheme, kind)
    build, model = spec.family.build(), _empty(p)
    if shares:
        check_groups(model, shares)
    wanted = model.weight_names(text_only=options.text_only)
    if other:
        wanted = together(wanted, changed, joins=joins)
    added = AddedError()
    try:
        if record:
            if joins:
                with shapes_only():
                    model.fuse_projections()
                wanted = model.weight_names(text_only=options.text_only)
            _check(files, model, wanted, p.placement.dtype)
            tensors = ((name, files.read(name)) for name in files.entries if name in wanted)
        else:
            used = partial(_used, model, shares, p.adapters.touched)
            tensors = build.iter_weights(files, spec.config, set(wanted), used)
            tensors = _merged(tensors, p.adapters, model, p.placement.dtype)
        model.requires_grad_(False).eval()
        for done, (name, tensor) in enumerate(tensors, start=1):
            _assign(model, name, tensor, p.placement, added, shares)
            if options.progress:
                options.progress("weights", done, len(wanted))
    except CheckpointError as error:
        raise _with_fitting_params(error, spec) from None
    if joins and not record:
        model.fuse_projections()
    if other:
        _share(other, model)
    if spec.packing and (remark := added.remark(spec.packing.label, options.quantize)):
        p.notices.append(remark)
    model.finish_loading(device)
    if repack:
        _repack(model, files if record else None)
    return model


def _empty(prepared: Prepared) -> FamilyModel:
    """The model on the meta device, in the formats that it will have."""
    spec, options = prepared.spec, prepared.options
    with shapes_only():
        model = spec.family.build().model(spec.config)
    set_formats(model, options.plan, prepared.formats)
    model.kv_dtype = torch.int8 if options.kv == "int8" else None
    return model


def _merged(
    tensors: Iterable[tuple[str, Tensor]],
    adapters: Adapters,
    model: FamilyModel,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with what the adapters change of them, before anything is rounded."""
    touched = adapters.touched
    for name, tensor in tensors:
        if name not in touched:
            yield name, tensor
            continue
        is_rounded = _buffer(model, name) is not None
        yield name, adapters.merged(name, tensor, torch.float32 if is_rounded else dtype)


def _used(
    model: FamilyModel, shares: Shares | None, touched: Collection[str], name: str
) -> Used | None:
    """What `_assign` keeps of a tensor, unless the whole of it is merged or rounded before."""
    cut = shares and shares.cut(name)
    if not shares or not cut or name in touched:
        return None
    is_rounded_whole = cut.axis == 1 and _buffer(model, name) is not None
    return None if is_rounded_whole else (cut.axis, cut.spans(shares.rank, shares.ranks))


def together(names: Collection[str], changed: Collection[str], *, joins: bool) -> list[str]:
    """Those of the `names` that are changed; joins: and those that are joined with one of them."""
    if not joins:
        return [name for name in names if name in changed]
    blocks = {name.rsplit(".", 2)[0] for name in changed}
    return [name for name in names if name.rsplit(".", 2)[0] in blocks]


def _share(other: Any, model: Any) -> None:
    """Take from `other` what `model` has no values of: whole modules, where it has none at all."""
    for name, child in model.named_children():
        tensors = [*child.parameters(), *child.buffers()]
        if tensors and all(tensor.is_meta for tensor in tensors):
            setattr(model, name, other.get_submodule(name))
        else:
            _share(other.get_submodule(name), child)
    for kind in ("_parameters", "_buffers"):
        held = getattr(model, kind)
        for name, tensor in held.items():
            if tensor is not None and tensor.is_meta:
                held[name] = getattr(other, kind)[name]


def check_fit(files: Checkpoint, spec: ModelSpec) -> None:
    """Compare the tensors with the model's, as loading does. Raises CheckpointError."""
    build, wanted = spec.family.build(), None
    if spec.text_only:
        with shapes_only():
            wanted = build.model(spec.config).weight_names(text_only=True)
    try:
        build.check_weights(files, spec.config, wanted)
    except CheckpointError as error:
        raise _with_fitting_params(error, spec) from None


def _repack(model: FamilyModel, mapped: Checkpoint | None) -> None:
    """Repack the weights layer by layer, so that one of them alone is there twice.

    mapped: where they lie in files, whose pages are given back.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            names = layer.tensor_names
            if layer.repack() and mapped:
                for tensor in names:
                    mapped.release(f"{name}.{tensor}")


def _joins(scheme: str, device_type: str) -> bool:
    """Whether layers that read the same input are joined; not where weights stay in their file."""
    return scheme != "none" or device_type != "cpu"


def _check(
    files: Checkpoint, model: FamilyModel, wanted: Collection[str], dtype: torch.dtype
) -> None:
    """Raise CheckpointError unless `files` hold what `model` stores, in `dtype` but for buffers."""
    held, buffers = model.state_dict(), dict(model.named_buffers())  # buffers: what is rounded
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    kinds = {n: str(t.dtype if n in buffers else dtype)[len("torch.") :] for n, t in held.items()}
    check_entries(files, files.entries, shapes, wanted, dtypes=kinds, advice="export it again")


def _buffer(model: FamilyModel, name: str) -> Tensor | None:
    """What will hold a weight that is rounded; None for a parameter."""
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner)._buffers.get(last)


def _assign(
    model: FamilyModel,
    name: str,
    tensor: Tensor,
    placement: Placement,
    added: AddedError,
    shares: Shares | None,
) -> None:
    """Put a tensor in its place: a parameter, a buffer as it is stored, or a weight to round.

    added: is told what holding a packed one adds.
    """
    owner, _, last = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    buffer = _buffer(model, name)
    if isinstance(tensor, PackedWeight):
        if buffer is not None:
            fill(module, tensor, placement.device, added)
            if shares and shares.cut(name):
                cut_rounded(shares, name, module)
            return
        tensor = tensor.to(placement.dtype)
    is_rounded = buffer is not None and buffer.dtype != tensor.dtype
    if shares and not (is_rounded and shares.cuts_columns(name)):
        tensor = shares.of(name, tensor)
    if buffer is None:
        tensor = tensor.to(placement.device, placement.dtype)
        setattr(module, last, nn.Parameter(tensor, requires_grad=False))
    elif not is_rounded:
        setattr(module, last, tensor.to(placement.device))
    else:
        tensor = tensor.to(placement.device)
        module.quantize(tensor)
        if shares and shares.cuts_columns(name):
            cut_rounded(shares, name, module)


def _with_fitting_params(error: CheckpointError, spec: ModelSpec) -> MmchatError:
    """Add which params file fits, when the checkpoint was made for other params."""
    fitting = params_file_for(error.fitting, spec) if isinstance(error, OtherConfigError) else None
    return CheckpointError(f"{error}; {fitting} fits") if fitting else error
