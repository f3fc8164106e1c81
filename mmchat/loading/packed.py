"""Layers whose weights another program packed.

Codes are kept where a format of ours holds them, and rounded anew elsewhere, some rows at a time,
so that no weight is in memory unpacked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from mmchat.catalog.spec import ModelSpec
from mmchat.checkpoints.checkpoint import Checkpoint
from mmchat.checkpoints.computed import PackedWeight, spans
from mmchat.checkpoints.gguf_checkpoint import GgufCheckpoint, GgufPacking
from mmchat.hardware.placement import Placement
from mmchat.loading.options import LoadOptions
from mmchat.nn.linear import Linear
from mmchat.nn.shapes_only import shapes_only
from mmchat.quant.formats.base import Format
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, BLOCKS8, Blocks
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.schemes import AUTO, PARTS, SCHEMES

_COMPARED = 64  # rows of each layer
_EQUAL = 5e-5  # an error that numbers in 16 bits make by themselves
# What holds GGUF's types of blocks as they are, Q4_0's scales in bfloat16; Q5_K is rounded to it.
_OF_BLOCKS: Mapping[str, Format] = {
    "Q4_0": Int4(32), "Q4_K": BLOCKS4, "Q5_K": BLOCKS6, "Q6_K": BLOCKS6, "Q5_0": BLOCKS8,
    "Q8_0": BLOCKS8,
}  # fmt: skip

# Part, rows, columns and format of a linear layer.
OtherLayer = tuple[str, int, int, Format]


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
        """What is to be said of weights that `label` packed; empty where no layer holds any."""
        if not self._squares:
            return ""
        share = sqrt(self._errors / self._squares)
        if share > _EQUAL:
            return (
                f"{label}: held as {scheme}, which adds {share:.1%}; --quantize none is exact, and"
                " larger"
            )
        return "" if label == GgufPacking.label else f"{label}: kept as it is"


def as_packed(
    files: Checkpoint, spec: ModelSpec, options: LoadOptions, placement: Placement
) -> tuple[LoadOptions, Mapping[str, Format] | None, tuple[OtherLayer, ...]]:
    """Options that leave the parts alone of which nothing is packed, and the layers that are.

    These by their names with their formats, or None for the plan's of all; and each that is held in
    another format than the plan's. A scheme that was asked for is that of all layers. Raises
    CheckpointError, and UsageError for parts to keep where nothing is rounded.
    """
    if options.quantize != AUTO or not files.computed:
        return options, None, ()
    build = spec.family.build()
    with shapes_only():
        model = build.model(spec.config)
    wanted = model.weight_names(text_only=options.text_only or spec.text_only)
    entries = build.check_weights(files, spec.config, wanted)
    blocks = files.blocks if isinstance(files, GgufCheckpoint) else {}
    parts = model.linear_parts()
    stored = {name: entries[f"{name}.weight"].name for name in parts if f"{name}.weight" in entries}
    packed = {n: part for n, part in parts.items() if stored.get(n) in files.computed}
    options = _as_stored(options, spec, placement, set(packed.values()))
    keeps_blocks = isinstance(SCHEMES[options.quantize], Blocks)
    formats, others = {}, []
    for name, part in parts.items():
        layer = model.get_submodule(name)
        if f"{name}.weight" not in wanted or not isinstance(layer, Linear):
            continue
        shape = layer.out_features, layer.in_features
        planned = options.plan.layer_format(part, *shape)
        formats[name] = planned if name in packed else PLAIN
        if keeps_blocks and planned is not PLAIN and (block := blocks.get(stored[name])):
            own = _OF_BLOCKS[block.name]
            formats[name] = own if own.fits(*shape) else INT8
        if formats[name] != planned:
            others.append((part, *shape, formats[name]))
    return options, formats, tuple(others)


def _as_stored(
    options: LoadOptions, spec: ModelSpec, placement: Placement, packed: Collection[str]
) -> LoadOptions:
    """`options` for the scheme of the checkpoint, which leaves all but the `packed` parts alone."""
    scheme = options.scheme(spec, placement)
    if scheme == "none":
        return replace(options, quantize=scheme)
    kept = tuple(part for part in PARTS if part not in packed or part in options.quantize_keep)
    return replace(options, quantize=scheme, quantize_keep=kept)


def fill(layer: Linear, weight: PackedWeight, device: torch.device, added: AddedError) -> None:
    """Give a layer the weights, on `device`, and tell `added` what that changed.

    Raises CheckpointError for those of another shape.
    """
    form, entry = layer.format, weight.entry
    wanted = (layer.out_features, layer.in_features)
    if entry.shape != wanted:
        raise entry.error(f"unpacked it is {list(entry.shape)}, expected {list(wanted)}")
    whole = [held.new_empty(held.shape, device=device) for held in layer.held()]
    for begin, end in spans(entry.shape):
        held = form.adopt(weight.codes(begin, end)) if weight.codes else None
        if held is None:
            held = form.quantize(weight.rows(begin, end).to(device))
        for place, rows in zip(whole, held, strict=True):
            place[begin:end] = rows
    layer.take(whole)
    added.add(layer, weight.rows(0, min(_COMPARED, len(whole[0]))))
