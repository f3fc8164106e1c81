"""Which schemes there are, and which linear layers of a model each one holds in which format.

int8 rounds every linear layer to int8 with one scale for each row, int8-b32 with one for each 32
weights. int4 rounds those of the text layers, cross-attention included, to int4, and the head, the
vision encoder and the projector to int8, which cost little and lose more; int6 likewise. nf4 and
fp4 are for weights that were rounded so, fp8 is for GPUs. Embeddings and norms keep their dtype.
auto is what a checkpoint was quantised to by another program, or none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mmchat.errors import UsageError, quoted
from mmchat.quant.formats.base import Format
from mmchat.quant.formats.blocks import BLOCKS4, BLOCKS6, BLOCKS8
from mmchat.quant.formats.fp8 import FP8
from mmchat.quant.formats.int4 import Int4
from mmchat.quant.formats.int8 import INT8
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.formats.table import FP4, NF4

PARTS = ("text", "head", "vision")
AUTO = "auto"  # in place of a scheme: as the weights are stored, or nearly so
# The format of the text layers; `Plan.layer_format` says that of all.
SCHEMES: Mapping[str, Format] = {
    AUTO: PLAIN,  # until the checkpoint is known
    "none": PLAIN,
    "int8": INT8,
    "int4": Int4(64),
    "int4-g32": Int4(32),
    "int4-g64": Int4(64),
    "int4-g128": Int4(128),
    "int4-b32": BLOCKS4,
    "int6": BLOCKS6,
    "int8-b32": BLOCKS8,
    "nf4": NF4,
    "fp4": FP4,
    "fp8": FP8,
}


@dataclass(frozen=True)
class Plan:
    """What to quantise. scheme: a name of SCHEMES; keep: parts that stay as they are."""

    scheme: str = "none"
    keep: tuple[str, ...] = ()

    def layer_format(self, part: str, out_features: int, in_features: int) -> Format:
        """Of a linear layer of `part` [out_features, in_features].

        Shapes that groups or blocks do not divide are held in int8.
        """
        if part in self.keep:
            return PLAIN
        found = SCHEMES[self.scheme]
        if not found.fits(out_features, in_features) or (found.is_coarse and part != "text"):
            return INT8
        return found


def make_plan(scheme: str, keep: Collection[str] = ()) -> Plan:
    """A plan from names. Raises UsageError, also for parts kept of nothing.

    AUTO quantises nothing until the checkpoint is known.
    """
    for part in keep:
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r} to keep; use {', '.join(PARTS)}")
    if find_scheme(scheme) == PLAIN and scheme != AUTO and keep:
        raise UsageError(
            f"--quantize-keep {' '.join(keep)} keeps nothing without --quantize; add"
            " --quantize int8 or int4, or leave it out"
        )
    return Plan("none" if scheme == AUTO else scheme, tuple(keep))


def find_scheme(name: str) -> Format:
    """The format of the scheme called `name`. Raises UsageError with the names."""
    if name in SCHEMES:
        return SCHEMES[name]
    raise UsageError(
        f"unknown quantisation scheme {quoted(name)}{_meant(name)}; use one of {', '.join(SCHEMES)}"
    )


def _meant(name: str) -> str:
    """What the scheme of another program comes nearest to."""
    if re.fullmatch(r"(?i)(b?f|fp|float|bfloat)(16|32)|half", name):
        return " (a number format, which --dtype takes)"
    if bits := re.fullmatch(r"(?i)(?:q|int|w|nf|fp|af|iq)?([48])(?:[-_]?bits?|[-_k].*)?", name):
        return f" (did you mean int{bits[1]}?)"
    return " (did you mean int4?)" if name.lower() in ("awq", "gptq", "hqq", "bnb") else ""
