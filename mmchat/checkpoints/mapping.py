"""Rules that translate the tensor names and layouts of one checkpoint format to those of another.

A rule pairs names of the source format with one name of the target format. `{}` in a name stands
for the number of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    """Source names and the target name that they become.

    layers: for names with `{}`, (number in the source, number in the target) of each layer.
    source_shapes: where they differ from the target's shape.
    """

    sources: tuple[str, ...]
    target: str
    transform: Transform = identity
    layers: Sequence[tuple[int, int]] | None = None
    source_shapes: tuple[Shape, ...] | None = None

    def expanded(self) -> Iterator[Rule]:
        """One rule without `{}` for each layer."""
        if self.layers is None:
            yield self
            return
        for there, here in self.layers:
            sources = tuple(name.format(there) for name in self.sources)
            yield replace(self, sources=sources, target=self.target.format(here), layers=None)


def expand(rules: Iterable[Rule]) -> list[Rule]:
    """Rules for single tensors. Raises ValueError if a name occurs twice on either side."""
    result = [single for rule in rules for single in rule.expanded()]
    for names in (
        [rule.target for rule in result],
        [name for rule in result for name in rule.sources],
    ):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two rules name {twice}")
    return result


def to_target(rules: Iterable[Rule], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(target name, tensor) for each expanded rule; `read` gives a source tensor."""
    for rule in rules:
        yield rule.target, rule.transform([read(name) for name in rule.sources])
