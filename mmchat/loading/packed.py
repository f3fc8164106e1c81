"""Layers whose weights another program packed.

Codes are kept where a format of ours holds them, and rounded anew elsewhere, some rows at a time,
so that no weight is in memory unpacked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import cast

import torch
from torch import Tensor

from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.packed.base import PackedWeight, fail
from mmchat.hardware.placement import Placement
from mmchat.loading.options import LoadOptions
from mmchat.models.build import FamilyModel
from mmchat.nn.linear import Linear
from mmchat.nn.shapes_only import shapes_only
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.schemes import AUTO, PARTS

_COMPARED = 64  # rows of each layer


@dataclass(frozen=True)
class PackedLayers:
    """weights: by the names of the model's weights; only: of the layers that are to be quantised,
    None for those of the plan; label: who packed them."""

    weights: Mapping[str, PackedWeight]
    only: Collection[str] | None
    label: str

    def fill(
        self,
        model: FamilyModel,
        files: Checkpoint,
        wanted: Collection[str],
        options: LoadOptions,
        device: torch.device,
        notices: list[str],
    ) -> set[str]:
        """Give the layers that are not plain their weights. Returns the names of these."""
        done, sums = set(), torch.zeros(2, dtype=torch.float64)
        for name in (name for name in self.weights if name in wanted):  # in the order of the files
            layer = model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, Linear) and layer.format is not PLAIN:
                sums += _fill(layer, self.weights[name], device)
                files.release(self.weights[name].entry.name)
                done.add(name)
                if options.progress:
                    options.progress("weights", len(done), len(wanted))
        if done:
            scheme, error = options.quantize, sqrt(float(sums[0] / sums[1]))
            how = (
                f"rounded to {scheme}, which adds {error:.1%}" if error > 5e-5 else "kept as it is"
            )
            notices.append(
                f"{self.label}: {how}" + ("; --quantize none is exact, and larger" * (error > 5e-5))
            )
        return done


def as_packed(
    files: Checkpoint, spec: ModelSpec, options: LoadOptions, placement: Placement
) -> tuple[LoadOptions, PackedLayers | None]:
    """Options that leave the parts alone of which nothing is packed, and the layers that are.

    A scheme that was asked for is that of all layers. None for GGUF, which is widened where it is
    read. Raises CheckpointError.
    """
    if files.format == "gguf":
        return options, None
    build = spec.family.build()
    with shapes_only():
        model = build.model(spec.config)
    wanted = model.weight_names(text_only=options.text_only or spec.text_only)
    entries = build.check_weights(files, spec.config, wanted)
    weights = {
        name: cast(PackedWeight, found)
        for name, entry in entries.items()
        if isinstance(found := files.computed.get(entry.name), PackedWeight)
    }
    label = spec.packing.label if spec.packing else ""
    if options.quantize != AUTO:
        return options, PackedLayers(weights, None, label)
    parts = model.linear_parts()
    only = {name for name in parts if f"{name}.weight" in weights}
    scheme = options.scheme(spec, placement)
    kept = tuple(part for part in PARTS if part not in {parts[name] for name in only})
    kept = kept if scheme != "none" else ()
    return replace(options, quantize=scheme, quantize_keep=kept), PackedLayers(weights, only, label)


def _fill(layer: Linear, weight: PackedWeight, device: torch.device) -> Tensor:
    """The squares of the error that is added and of the weight, of some rows, float64 [2]."""
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
    exact = weight.rows(0, min(_COMPARED, weight.entry.shape[0])).to(device)
    ours = form.widen(*(tensor[: len(exact)] for tensor in whole)).to(exact.dtype)
    error = ours.double() - exact.double()
    return torch.stack([error.square().sum(), exact.double().square().sum()]).cpu()
