"""Linear layers whose weights are 16- or 32-bit, int8, int4 or fp8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmchat.nn.shapes_only import shapes_only
from mmchat.quant.kernels import ops, reference
from mmchat.quant.schemes import Plan, layer_scheme

FLOAT8 = torch.float8_e4m3fn
FLOAT8_LARGEST = 448.0


class Linear(nn.Linear):
    """nn.Linear that reads bfloat16 weights on the CPU at the speed of memory."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self.weight
        plain = weight.dtype != torch.bfloat16 or weight.device.type != "cpu"
        if plain or (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)):
            return F.linear(x, weight, self.bias)
        y = ops.linear_bf16(x, weight)
        return y if self.bias is None else y + self.bias


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ + bias with rounded weights; x: [..., K] -> [..., N] in x's dtype.

    weight, weight_scale and weight_zero are in the formats of mmchat.quant.kernels (group_size: of
    int4; None means one scale for each row).
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    packed: Tensor  # None until it is needed, as packed_scales
    packed_scales: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int | None, bias: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("packed_scales", None, persistent=False)
        self.register_buffer("weight_zero", None)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        if bits == 4 and group_size:
            groups = in_features // group_size
            self.register_buffer(
                "weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            )
            for name in ("weight_scale", "weight_zero"):
                empty = torch.empty(out_features, groups, dtype=torch.bfloat16)
                self.register_buffer(name, empty)
        else:
            self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.empty(out_features))

    def quantize(self, weight: Tensor) -> None:
        """Take `weight` [N, K], rounded, on its device."""
        if self.weight_zero is not None:
            parts = ops.quantize_int4(weight, self.group_size or 0)
            self.weight, self.weight_scale, self.weight_zero = parts
        else:
            self.weight, self.weight_scale = ops.quantize_int8(weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        on_cpu = self.weight.device.type == "cpu"
        if on_cpu and self.pack():
            return ops.linear_packed_int4(x, self.packed, self.packed_scales)
        if self.weight_zero is not None:
            parts = (self.weight, self.weight_scale, self.weight_zero)
            if on_cpu:
                return ops.linear_int4(x, *parts)
            return F.linear(x, reference.widen_int4(*parts, x.dtype))
        if on_cpu:
            return ops.linear_int8(x, self.weight, self.weight_scale)
        # scaling the product and not the weights lets a compiler read int8 from memory
        return F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype)

    def pack(self) -> bool:
        """Take the order of torch's int4 kernel where that serves; whether the weights are in it.

        Done at first use, or before the weights are handed to a compiled program.
        """
        if self.weight_zero is None or self.packed is not None or torch.compiler.is_compiling():
            return self.packed is not None
        found = ops.pack_int4(self.weight, self.weight_scale, self.weight_zero)
        if found is None:
            return False
        self.packed, self.packed_scales = found
        empty = self.weight.new_empty(0)
        self.weight, self.weight_scale, self.weight_zero = empty, empty, empty
        return True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:
            raise RuntimeError("the weights are in this processor's order; load them anew to save")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{group}"


class Float8Linear(nn.Module):
    """y = x · Wᵀ + bias with float8_e4m3fn weights, on GPUs that multiply them.

    x: [..., K] is rounded to float8 with one scale for each token. weight: [N, K], weight_scale:
    float32 [N].
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=FLOAT8))
        self.register_buffer("weight_scale", torch.empty(out_features))

    weight: Tensor
    weight_scale: Tensor

    def quantize(self, weight: Tensor) -> None:
        """Take `weight` [N, K], rounded, on its device."""
        self.weight, scale = _to_float8(weight)
        self.weight_scale = scale[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _to_float8(x.reshape(-1, self.in_features))
        y = torch.ops.aten._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale[None],
            out_dtype=torch.bfloat16,
        )
        y = y.to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _to_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> float8 [N, K] and float32 scale [N, 1]."""
    wide = values.float()
    scale = (wide.abs().amax(1, keepdim=True) / FLOAT8_LARGEST).clamp(min=1e-12)
    return (wide / scale).to(FLOAT8), scale


AnyLinear = Linear | QuantizedLinear | Float8Linear


def fuse(parent: nn.Module, names: Sequence[str], into: str) -> None:
    """Replace linear layers of one input by a single one, whose rows are theirs in order.

    They have no biases and one format, else they stay as they are.
    """
    layers = [getattr(parent, name) for name in names]
    first = layers[0]
    tensors = [dict(layer.named_buffers()) | dict(layer.named_parameters()) for layer in layers]
    alike = all(
        type(layer) is type(first)
        and layer.bias is None
        and {n: t.dtype for n, t in own.items()} == {n: t.dtype for n, t in tensors[0].items()}
        for layer, own in zip(layers, tensors, strict=True)
    )
    if not alike:
        return
    for name in tensors[0]:
        joined = _joined([own[name] for own in tensors])
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


def replace_linears(model: nn.Module, plan: Plan) -> None:
    """Put empty quantised layers in the place of the linear layers of a model on the meta device.

    The model's `linear_parts()` says which layers there are. Each waits for `quantize(weight)`.
    """
    if plan.scheme is None:
        return
    for name, part in model.linear_parts().items():  # type: ignore[operator]
        old = model.get_submodule(name)
        if not isinstance(old, Linear):
            raise TypeError(f"{name} is quantised already")
        chosen = layer_scheme(plan.scheme, part, old.in_features, plan.keep)
        if chosen is None:
            continue
        sizes, has_bias = (old.in_features, old.out_features), old.bias is not None
        with shapes_only():
            if chosen.is_float:
                new = Float8Linear(*sizes, has_bias)
            else:
                new = QuantizedLinear(*sizes, chosen.bits, chosen.group_size, has_bias)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, new)
