"""Rules that translate the tensor names and layouts of one checkpoint format to those of another.

A rule pairs names of the source format with one name of the target format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
# How the tensors of the source become that of the target.
Transform = Callable[[Sequence["Tensor"]], "Tensor"]


def identity(sources: Sequence[Tensor]) -> Tensor:
    """The one source as it is."""
    return sources[0]


def scalar(sources: Sequence[Tensor]) -> Tensor:
    """A single number, which some files store as a scalar or repeated; the target is [1]."""
    return sources[0].reshape(-1)[:1]


def concatenate(sources: Sequence[Tensor]) -> Tensor:
    """One after the other along the first axis."""
    import torch

    return torch.cat(list(sources), dim=0)


def reshape(target: Shape) -> Transform:
    """The same numbers in the same order, in another shape."""
    return lambda sources: sources[0].reshape(target)


def interleaved_to_halves(heads: int) -> Transform:
    """Rows of a query or key projection for rotary embedding, [H·D, E], head by head.

    The source rotates rows 2i and 2i + 1 of a head as a pair, the target rows i and i + D/2.
    """

    def transform(sources: Sequence[Tensor]) -> Tensor:
        import torch

        order = torch.arange(len(sources[0])).reshape(heads, -1, 2).transpose(1, 2)
        return sources[0][order.reshape(-1)]

    return transform


@dataclass(frozen=True)
class Rule:
    """Source names, and the target name that they become. shapes: of the sources."""

    sources: tuple[str, ...]
    target: str
    shapes: tuple[Shape, ...]
    transform: Transform = identity


def source_shapes(rules: Iterable[Rule]) -> dict[str, Shape]:
    """Name -> shape of every tensor that the rules read."""
    return {
        name: shape for rule in rules for name, shape in zip(rule.sources, rule.shapes, strict=True)
    }
