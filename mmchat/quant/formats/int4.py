"""int4: 16 levels with a scale and a zero for each group of weights, w = (q - 8) · scale + zero."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.quant import kernels
from mmchat.quant.formats.base import Format, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.checkpoints.codes import Codes

# Rows of torch's own int4 kernel: it asks for a multiple of 16 and takes 64 together.
TORCH_MULTIPLE, TORCH_ROWS = 16, 64
# Of its kernel for Apple GPUs: rows are a multiple, and tokens up to which it moves fewer bytes
# than widening: half a byte of each weight for each token, not about 30 for all.
METAL_MULTIPLE, METAL_TOKENS = 8, 32


@dataclass(frozen=True)
class Int4(Format["Tensor", "Tensor", "Tensor"]):
    """weight: uint8 [N, K/2], byte j holds the elements 2j (low half) and 2j + 1, each 0..15;
    weight_scale, weight_zero: bfloat16 [N, K/group_size]. group_size: 32, 64 or 128."""

    group_size: int

    name = "int4"
    operator = "linear_int4"
    repacks = calibrates = is_coarse = True
    bits = 4

    @property
    def whole(self) -> tuple[int, int]:
        return 1, self.group_size

    def fits(self, rows: int, columns: int) -> bool:  # noqa: ARG002
        return columns % self.group_size == 0

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        weight, groups = (rows, columns // 2), ("bfloat16", (rows, columns // self.group_size))
        return {"weight": ("uint8", weight), "weight_scale": groups, "weight_zero": groups}

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantize = kernels.ops.rounding(weight).quantize_int4
        return kernels.ops.by_rows(lambda rows: quantize(rows, self.group_size), weight)

    def adopt(self, codes: Codes) -> tuple[Tensor, Tensor, Tensor] | None:
        """The levels as they are, with scale and zero in bfloat16."""
        levels, scale, zero = codes.levels, codes.scale, codes.zero
        is_whole = codes.large is not None
        if zero is None or is_whole or 2 * levels.shape[1] != self.group_size * scale.shape[1]:
            return None
        return levels, scale.bfloat16(), zero.bfloat16()

    def grid(self, _weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        return scale.float(), zero.float()

    def with_levels(
        self, levels: Tensor, _weight: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return levels[:, ::2] | levels[:, 1::2] << 4, scale, zero

    def widen(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return kernels.reference.widen_int4(weight, scale, zero)

    def on_cpu(self, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ops = kernels.ops
        if library := ops.library_for(x):
            return ops.rounded(library.linear_int4, library.widen_int4, x, weight, scale, zero)
        return super().on_cpu(x, weight, scale, zero)

    def repack(
        self, weight: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Format, dict[str, Tensor]] | None:
        """The order of the compiled kernel, or where there is none of torch's own.

        Rows that fill no panel of the compiled one stay as they are, and so does all on ARM, whose
        kernels have been timed nowhere.
        """
        if weight.device.type == "mps":
            return _for_metal(weight, scale, zero)
        if weight.device.type != "cpu":
            return None
        if library := kernels.native.library():
            rows, half, ops = *weight.shape, kernels.ops
            if not library.packs_int4 or rows % ops.PANEL or 2 * half % ops.BLOCK:
                return None
            held = (tensor.contiguous() for tensor in (weight, scale, zero))
            return PackedInt4(self.group_size), {"weight": library.pack_int4(*held)}
        if weight.shape[0] % TORCH_MULTIPLE:
            return None
        import torch

        packed = torch.empty_like(weight)
        for begin, end in kernels.ops.spans(len(weight), 8 * weight.shape[1], TORCH_ROWS):
            rows = weight[begin:end]  # whose levels take 8 bytes a byte, as int32
            levels = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1).to(torch.int32)
            packed[begin:end] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        return TorchInt4(), {"weight": packed, "weight_scale": _joined(scale, zero)}


def _joined(scale: Tensor, zero: Tensor) -> Tensor:
    """Scales and zeros [N, G] as torch's kernels read them: [G, N, 2]."""
    import torch

    return torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class PackedInt4(Format["Tensor"]):
    """int4 in the order of the compiled kernel: weight: uint8 [N, K/2 + 4 K/group_size], levels,
    scales and zeros of 8 rows in one stream (kernels.reference.pack_int4 says how)."""

    group_size: int

    name = "int4"
    operator = "linear_packed_int4"
    is_portable = False

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": ("uint8", (rows, columns // 2 + 4 * columns // self.group_size))}

    def unpack(self, weight: Tensor) -> dict[str, Tensor]:
        names = ("weight", "weight_scale", "weight_zero")
        held = kernels.reference.unpack_int4(weight, self.group_size)
        return dict(zip(names, held, strict=True))

    def widen(self, weight: Tensor) -> Tensor:
        reference = kernels.reference
        return reference.widen_int4(*reference.unpack_int4(weight, self.group_size))

    def on_cpu(self, x: Tensor, weight: Tensor) -> Tensor:
        ops, library = kernels.ops, kernels.ops.library_for(x)
        if library is None:  # switched off since
            return super().on_cpu(x, weight)
        widen = functools.partial(library.widen_packed_int4, width=x.shape[-1])
        return ops.rounded(library.linear_packed_int4, widen, x, weight)


class TorchInt4(Format["Tensor", "Tensor"]):
    """int4 in the order of torch's own kernel for this processor: weight: uint8 [N, K/2],
    weight_scale: bfloat16 [K/group_size, N, 2], scale and zero."""

    name = "int4"
    is_portable = False

    def product(self, x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        import torch

        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return kernels.ops.shaped(multiply(rows, weight, x.shape[-1] // len(groups), groups), x)


class MetalInt4(Format["Tensor", "Tensor"]):
    """int4 for torch's kernel on Apple GPUs, which has not been run on one yet. weight: uint8
    [N, K/2] as Int4's; weight_scale: bfloat16 [K/group_size, N, 2], scale and zero."""

    name = "int4"
    is_portable = False

    def widen(self, weight: Tensor, groups: Tensor) -> Tensor:
        scale, zero = groups.unbind(-1)
        return kernels.reference.widen_int4(weight, scale.T, zero.T)

    def product(self, x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        import torch

        if kernels.ops.tokens(x) > METAL_TOKENS:
            return self.on_gpu(x, weight, groups)
        rows, width = x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1]
        # the shape that torch asks for; the kernel reads rows as they are
        shaped = weight.view(torch.int32).reshape(len(weight) // METAL_MULTIPLE, width // 32, 32, 1)
        multiply = torch.ops.aten._weight_int4pack_mm
        y = multiply(rows, shaped, width // len(groups), groups.to(x.dtype))
        return kernels.ops.shaped(y, x)


def _for_metal(
    weight: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Format, dict[str, Tensor]] | None:
    """Weights on an Apple GPU for torch's kernel; None where that does not give their products."""
    group = 2 * weight.shape[1] // scale.shape[1]
    if weight.shape[0] % METAL_MULTIPLE or not _metal_is_right(weight.device, group):
        return None
    return MetalInt4(), {"weight": weight, "weight_scale": _joined(scale, zero)}


@functools.cache
def _metal_is_right(device: torch.device, group: int) -> bool:
    """Whether torch's kernel is there and gives the product of a small weight."""
    import torch

    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 256, (16, 2 * group), dtype=torch.uint8, generator=draw)
    x, scale, zero = (
        torch.randn(rows, width, generator=draw).bfloat16()
        for rows, width in ((3, 4 * group), (16, 4), (16, 4))
    )
    expected = x.float() @ kernels.reference.widen_int4(weight, scale, zero).T
    held = weight.to(device), _joined(scale, zero).to(device)
    try:
        found = MetalInt4().product(x.to(device), *held).cpu().float()
    except RuntimeError:
        return False
    return bool((found - expected).norm() < 0.02 * expected.norm())  # rounded to bfloat16
