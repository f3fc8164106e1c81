"""Linear layers, whose weights may be held in any format of mmchat.quant.formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmchat.quant import operators as _operators  # noqa: F401  a compiler finds the products there
from mmchat.quant.formats.base import Format
from mmchat.quant.formats.plain import PLAIN
from mmchat.quant.kernels import ops
from mmchat.quant.schemes import Plan


class Linear(nn.Linear):
    """y = x · Wᵀ + bias; x: [..., K] -> [..., N] in x's dtype.

    W is a parameter while it is plain, else the buffers that its format names.
    """

    format: Format = PLAIN
    tensor_names: tuple[str, ...] = ("weight",)

    def set_format(self, format: Format) -> None:
        """Make room for a weight in `format`, without its values."""
        if format == self.format:
            return
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=self.weight.device)
            for name, (dtype, shape) in format.tensors(self.out_features, self.in_features).items()
        }
        self._hold(format, tensors)

    def quantize(self, weight: Tensor) -> None:
        """Take `weight` [N, K], rounded to the format, on its device."""
        self.take(self.format.quantize(weight))

    def take(self, held: Sequence[Tensor]) -> None:
        """Take a weight in the format."""
        for name, tensor in zip(self.tensor_names, held, strict=True):
            setattr(self, name, tensor)

    def held(self) -> list[Tensor]:
        """What holds the weight, as the format takes it."""
        find: Any = self.__getattr__  # nn.Module's own look-up, to which getattr comes last
        return list(map(find, self.tensor_names))

    def forward(self, input: Tensor) -> Tensor:
        if self.format is PLAIN:
            weight = self.weight
            # on a CPU the kernel reads these at the speed of memory; it has no gradient
            reads_fast = weight.dtype == torch.bfloat16 and weight.is_cpu
            if not reads_fast or ops.needs_gradient(input, weight):
                return ops.linear(input, weight, self.bias)
        elif self.format.repacks:
            self.repack()
        y, bias = self.format.product(input, *self.held()), self.bias
        return y if bias is None else y.add_(bias)  # another y would cost ten times the sum

    def repack(self) -> bool:
        """Bring the weight into the order that this machine reads fastest; False if it is.

        Done when a model has been loaded, and at first use where it has not been.
        """
        if torch.compiler.is_compiling() or not self.format.repacks:
            return False
        if found := self.format.repack(*self.held()):
            self._hold(*found)
        return found is not None

    def _hold(self, format: Format, tensors: Mapping[str, Tensor]) -> None:
        for name in self.tensor_names:
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.format, self.tensor_names = format, tuple(tensors)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.format.is_portable:
            for name in self.tensor_names:
                del destination[prefix + name]
            for name, tensor in self.format.unpack(*self.held()).items():
                destination[prefix + name] = tensor

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}"


class HasLinears(Protocol):
    """A model that says which part each of its linear layers belongs to."""

    def linear_parts(self) -> Mapping[str, str]: ...

    def get_submodule(self, target: str) -> nn.Module: ...


def set_formats(model: HasLinears, plan: Plan, formats: Mapping[str, Format] | None = None) -> None:
    """Make room for the weights of `plan` in a model on the meta device.

    Layers that are not plain wait for `quantize(weight)`. formats: in place of the plan, by the
    names of layers; the others stay plain.
    """
    for name, part in model.linear_parts().items():
        layer: Linear = model.get_submodule(name)  # type: ignore[assignment]
        planned = plan.layer_format(part, *layer.weight.shape)
        layer.set_format(planned if formats is None else formats.get(name, PLAIN))


def fuse(parent: nn.Module, names: Sequence[str], into: str) -> None:
    """Replace linear layers of one input by a single one, whose rows are theirs in order.

    They have no biases and one portable format, else they stay as they are; so they do when joined.
    """
    if not hasattr(parent, names[0]):
        return
    layers: list[Linear] = [getattr(parent, name) for name in names]
    first = layers[0]
    kinds = {(layer.format, layer.weight.dtype, layer.bias is None) for layer in layers}
    if len(kinds) > 1 or first.bias is not None or not first.format.is_portable:
        return
    for name in first.tensor_names:
        joined = _joined([getattr(layer, name) for layer in layers])
        is_parameter = name in first._parameters
        setattr(first, name, nn.Parameter(joined, requires_grad=False) if is_parameter else joined)
    first.out_features = sum(layer.out_features for layer in layers)
    for name in names:
        delattr(parent, name)
    setattr(parent, into, first)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    if rows[0].is_meta:  # of which torch.cat would import torch's compiler
        return rows[0].new_empty(sum(map(len, rows)), *rows[0].shape[1:])
    return torch.cat(list(rows))
