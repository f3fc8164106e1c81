"""Which schemes there are, and which linear layers of a model each one rounds to what.

int8 rounds every linear layer to int8 with one scale for each row. int4 rounds those of the text
layers, cross-attention included, to int4, and the head, the vision encoder and the projector to
int8, which cost little and lose more. Embeddings and norms keep their dtype. fp8 is for GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mmchat.errors import UsageError

PARTS = ("text", "head", "vision")


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is stored. bits: of a weight; group_size: weights that share a scale and
    a zero (None: a row shares one scale). is_float: float8 in place of whole numbers."""

    name: str
    bits: int
    group_size: int | None = None
    is_float: bool = False

    @property
    def bits_per_weight(self) -> float:
        """With the scales and zeros of the groups, 16 bits each; those of rows are left out."""
        return self.bits + 32 / self.group_size if self.group_size else float(self.bits)


INT8 = Scheme("int8", 8)
SCHEMES: Mapping[str, Scheme | None] = {
    "none": None,
    "int8": INT8,
    "int4": Scheme("int4", 4, 64),
    "int4-g32": Scheme("int4-g32", 4, 32),
    "int4-g64": Scheme("int4-g64", 4, 64),
    "int4-g128": Scheme("int4-g128", 4, 128),
    "fp8": Scheme("fp8", 8, is_float=True),
}


def find_scheme(name: str) -> Scheme | None:
    """The scheme called `name`; None for "none". Raises UsageError with the names."""
    if name in SCHEMES:
        return SCHEMES[name]
    raise UsageError(f"unknown quantisation scheme {name!r}; use one of {', '.join(SCHEMES)}")


def layer_scheme(
    scheme: Scheme, part: str, in_features: int, keep: Collection[str] = ()
) -> Scheme | None:
    """How a linear layer of `part` with `in_features` inputs is stored; None: as it is.

    keep: parts that are not quantised. A width that the groups do not divide is stored in int8.
    """
    if part in keep:
        return None
    if scheme.group_size and (part != "text" or in_features % scheme.group_size):
        return INT8
    return scheme


@dataclass(frozen=True)
class Plan:
    """What to quantise. scheme: None for nothing; keep: parts that stay as they are."""

    scheme: Scheme | None = None
    keep: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.scheme.name if self.scheme else "none"


def make_plan(scheme: str, keep: Collection[str] = ()) -> Plan:
    """A plan from names. Raises UsageError, also for parts kept of nothing."""
    check_parts(keep)
    found = find_scheme(scheme)
    if keep and found is None:
        raise UsageError(
            f"--quantize-keep {' '.join(keep)} keeps nothing without --quantize; add"
            " --quantize int8 or int4, or leave it out"
        )
    return Plan(found, tuple(keep))


def check_parts(keep: Collection[str]) -> None:
    """Raises UsageError for a part that no model has."""
    for part in keep:
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r} to keep; use {', '.join(PARTS)}")
