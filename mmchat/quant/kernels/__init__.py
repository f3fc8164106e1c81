"""Matrix products with large weights and few tokens, and attention, for the CPU.

A language model that writes one token at a time reads every weight once for it, so its speed is
that of memory. torch's own products reach a fraction of it, or lack the format, and its attention
of many queries reaches a third of what the processor computes. Here are C kernels, which come with
the wheel or are compiled on first use (`native`, `compiler`), and what stands in for them
(`reference`, `blocks_reference`, and torch's own kernels). `ops` picks one by what the machine has;
its `probe` says which and why.

Weights are row-major (mmchat.quant.formats) or in blocks, so that a tensor mapped from a file is
used where it lies. Only int4 is brought into another order when it is loaded, where the processor
has AVX2.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmchat.quant.kernels import blocks_reference as blocks_reference
    from mmchat.quant.kernels import native as native
    from mmchat.quant.kernels import ops as ops
    from mmchat.quant.kernels import reference as reference


def __getattr__(name: str) -> ModuleType:
    """Its modules, which import torch, when they are first used."""
    if name in ("blocks_reference", "native", "ops", "reference"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"{__name__} has no {name!r}")
