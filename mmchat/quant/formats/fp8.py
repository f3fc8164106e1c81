"""fp8: float8 with one scale for each row, on GPUs that multiply it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.errors import DeviceError
from mmchat.quant.formats.base import Format, Stored, adopted_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.checkpoints.codes import Codes

LARGEST = 448.0  # of float8_e4m3fn


class Float8(Format["Tensor", "Tensor"]):
    """weight: float8_e4m3fn [N, K], weight_scale: float32 [N]. Activations are rounded to float8
    as well, with one scale for each token."""

    name = "fp8"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": ("float8_e4m3fn", (rows, columns)), "weight_scale": ("float32", (rows,))}

    def check_device(self, device: torch.device) -> None:
        import torch

        if device.type != "cuda":
            raise DeviceError(f"fp8 needs a CUDA device, not {device}; use int8 or int4")
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise DeviceError(
                f"fp8 needs compute capability 8.9, {device} has {major}.{minor}; use int8 or int4"
            )

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        wide = weight.float()
        scale = (wide.abs().amax(1) / LARGEST).clamp(min=1e-12)  # rows of zeros are divided too
        return (wide / scale[:, None]).to(torch.float8_e4m3fn), scale

    def adopt(self, codes: Codes) -> tuple[Tensor, Tensor] | None:
        return adopted_rows(codes, "float8_e4m3fn")

    def widen(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.float() * scale[:, None]

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        import torch

        rows, row_scale = self.quantize(x.reshape(-1, x.shape[-1]))
        scales = row_scale[:, None], scale[None]
        y = torch.ops.aten._scaled_mm(rows, weight.t(), *scales, out_dtype=torch.bfloat16)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


FP8 = Float8()
