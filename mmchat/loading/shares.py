"""The share of a model that one of several ranks holds: cut while loading, and made to add up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmchat.errors import UsageError
from mmchat.models.build import FamilyModel
from mmchat.nn.decoder import SelfAttention
from mmchat.nn.linear import Linear
from mmchat.parallel.slices import Shares

if TYPE_CHECKING:
    from mmchat.parallel.group import Group


def check_groups(model: FamilyModel, shares: Shares) -> None:
    """Raises UsageError where a group of weights, which have one scale, would lie on two ranks."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and shares.splits(name, *layer.format.whole):
            raise UsageError(
                f"--parallel {shares.ranks} would cut groups of {layer.format.whole[1]} weights of"
                f" {name!r}; use a smaller group (--quantize int4-g32), int8, or fewer ranks"
            )


def cut_rounded(shares: Shares, name: str, layer: Linear) -> None:
    """Keep the rank's part of a weight that was rounded as a whole, whatever the number of ranks.

    name: of its tensor.
    """
    owner = name.rpartition(".")[0]
    is_by_columns = shares.cuts_columns(name)
    together = layer.format.whole[0] if is_by_columns else 1  # rows in one stream
    for tensor in layer.tensor_names:
        held = getattr(layer, tensor)
        lines = held if together == 1 else held.reshape(len(held) // together, -1)
        own = shares.of(f"{owner}.{tensor}", lines)
        own = own if together == 1 else own.reshape(len(held), -1)
        setattr(layer, tensor, own if is_by_columns else own.clone())  # not a view of them all


def join(model: FamilyModel, group: Group, shares: Shares) -> None:
    """Let a model whose weights are cut give what the whole one gives, on rank 0."""
    model.ranks = shares.ranks
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention):
            query, key, value = (size // shares.ranks for size in module.sizes)
            module.sizes = (query, key, value)
        cut = shares.cut(name)
        if cut is None or not isinstance(module, Linear):
            continue
        sizes = [cut.size(rank, shares.ranks) for rank in range(shares.ranks)]
        if cut.axis == 1:
            module.in_features = sizes[shares.rank]
            _after(module, group.sum)
        else:
            module.out_features = sizes[shares.rank]
            if cut.gathered:
                is_first = cut.gathered == "first"
                _after(module, partial(group.gather, sizes=sizes, first=is_first))


def _after(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let the layer give what `change` makes of its result."""

    def changed(_layer: nn.Module, _given: object, y: Any) -> Tensor:
        return change(y)

    layer.register_forward_hook(changed)
