"""Layers whose weights another program packed.

Codes are kept where a format of ours holds them, and rounded anew elsewhere, some rows at a time,
so that no weight is in memory unpacked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.gguf_checkpoint import GgufCheckpoint
from mmchat.checkpoints.packed.base import PackedWeight, fail
from mmchat.hardware.placement import Placement
from mmchat.loading.options import LoadOptions
from mmchat.loading.shares import cut_rounded
from mmchat.models.build import FamilyModel
from mmchat.nn.linear import Linear
from mmchat.nn.shapes_only import shapes_only
from mmchat.parallel.slices import Shares
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.schemes import AUTO, PARTS

_COMPARED = 64  # rows of each layer
_EQUAL = 5e-5  # an error that numbers in 16 bits make by themselves


class AddedError:
    """How far rounded weights are from what is rounded, of some rows of each: root mean square."""

    def __init__(self) -> None:
        self._squares = self._errors = 0.0

    def add(self, layer: Linear, exact: Tensor) -> None:
        """exact: the weight [n, K] of the layer, or its first rows."""
        rows = slice(0, _COMPARED)
        found = layer.format.widen(*(held[rows] for held in layer.held()))
        wide = exact[rows].to(found.device)
        self._squares += float(wide.double().square().sum())
        self._errors += float((found.to(wide.dtype).double() - wide.double()).square().sum())

    def remark(self, label: str, scheme: str) -> str:
        """What is to be said of weights that `label` packed; empty where nothing was added."""
        share = sqrt(self._errors / self._squares) if self._squares else 0.0
        if share <= _EQUAL:
            return ""
        return (
            f"{label}: rounded to {scheme}, which adds {share:.1%}; --quantize none is exact, and"
            " larger"
        )


@dataclass(frozen=True)
class PackedLayers:
    """weights: by the names of the model's weights; only: of the layers that are to be quantised,
    None for those of the plan; label: who packed them; left: (part, rows, columns) of the layers
    that are not to be quantised."""

    weights: Mapping[str, PackedWeight]
    only: Collection[str] | None
    label: str
    left: tuple[tuple[str, int, int], ...] = ()

    def fill(
        self,
        model: FamilyModel,
        files: Checkpoint,
        wanted: Collection[str],
        options: LoadOptions,
        device: torch.device,
        notices: list[str],
        shares: Shares | None = None,
    ) -> set[str]:
        """Give the layers that are not plain their weights. Returns the names of these."""
        done, added = set(), AddedError()
        for name in (name for name in self.weights if name in wanted):  # in the order of the files
            layer = model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, Linear) and layer.format is not PLAIN:
                _fill(layer, self.weights[name], device)
                added.add(layer, self.weights[name].rows(0, min(_COMPARED, layer.out_features)))
                if shares and shares.cut(name):
                    cut_rounded(shares, name, layer)
                files.release(self.weights[name].entry.name)
                done.add(name)
                if options.progress:
                    options.progress("weights", len(done), len(wanted))
        if done:
            kept = f"{self.label}: kept as it is"
            notices.append(added.remark(self.label, options.quantize) or kept)
        return done


def as_packed(
    files: Checkpoint, spec: ModelSpec, options: LoadOptions, placement: Placement
) -> tuple[LoadOptions, PackedLayers | None]:
    """Options that leave the parts alone of which nothing is packed, and the layers that are.

    A scheme that was asked for is that of all layers. None for GGUF, which is widened where it is
    read. Raises CheckpointError, and UsageError for parts to keep where nothing is rounded.
    """
    if isinstance(files, GgufCheckpoint):
        if options.quantize == AUTO:
            options = _as_stored(options, spec, placement, files.packed_parts)
        return options, None
    build = spec.family.build()
    with shapes_only():
        model = build.model(spec.config)
    wanted = model.weight_names(text_only=options.text_only or spec.text_only)
    entries = build.check_weights(files, spec.config, wanted)
    weights = {
        name: found
        for name, entry in entries.items()
        if isinstance(found := files.computed.get(entry.name), PackedWeight)
    }
    label = spec.packing.label if spec.packing else ""
    if options.quantize != AUTO:
        return options, PackedLayers(weights, None, label)
    parts = model.linear_parts()
    only = {name for name in parts if f"{name}.weight" in weights}
    left = [
        (part, layer.out_features, layer.in_features)
        for name, part in parts.items()
        if name not in only
        and f"{name}.weight" in wanted
        and isinstance(layer := model.get_submodule(name), Linear)
    ]
    options = _as_stored(options, spec, placement, {parts[name] for name in only})
    return options, PackedLayers(weights, only, label, tuple(left))


def _as_stored(
    options: LoadOptions, spec: ModelSpec, placement: Placement, packed: Collection[str]
) -> LoadOptions:
    """`options` for the scheme of the checkpoint, which leaves all but the `packed` parts alone."""
    scheme = options.scheme(spec, placement)
    if scheme == "none":
        return replace(options, quantize=scheme)
    kept = tuple(part for part in PARTS if part not in packed or part in options.quantize_keep)
    return replace(options, quantize=scheme, quantize_keep=kept)


def _fill(layer: Linear, weight: PackedWeight, device: torch.device) -> None:
    """Give a layer the weights, on `device`. Raises CheckpointError for those of another shape."""
    form = layer.format
    wanted = (layer.out_features, layer.in_features)
    if weight.entry.shape != wanted:
        fail(weight.entry, f"unpacked it is {list(weight.entry.shape)}, expected {list(wanted)}")
    whole = [held.new_empty(held.shape, device=device) for held in layer.held()]
    for begin, end in weight.spans():
        held = None
        if weight.codes:
            codes = weight.codes(begin, end)
            held = form.adopt(codes.levels, codes.scale, codes.zero)
        if held is None:
            held = form.quantize(weight.rows(begin, end).to(device))
        for place, rows in zip(whole, held, strict=True):
            place[begin:end] = rows
    for name, tensor in zip(layer.tensor_names, whole, strict=True):
        setattr(layer, name, tensor)
