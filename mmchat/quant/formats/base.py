"""What a format of weights says and does; each is a file of this folder.

A format says its tensors without torch, so that sizes cost nothing. Its arithmetic is torch's and
that of `kernels`, which are loaded when something is first computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVarTuple

from mmchat.quant import kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.checkpoints.codes import Codes

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}


# Torch's name of a dtype, and a shape. The dtype of the model has no name.
Stored = tuple[str, tuple[int, ...]]
Held = TypeVarTuple("Held")


@dataclass(frozen=True)
class Format(Generic[*Held]):
    """How the weight [N, K] of a linear layer is held.

    `*held` are the tensors that `tensors` names, in its order. The first is called `weight`, and
    each has N rows, so that the layers of one input can be joined. A new format is a file of
    this folder, a line in mmchat.quant.operators, and one in mmchat.quant.schemes if weights are
    rounded to it. Without a kernel of its own `widen` is enough.
    """

    name: ClassVar[str]
    operator: ClassVar[str]  # of torch.ops.mmchat, which computes `on_cpu` in compiled programs
    is_portable = True  # whether the tensors mean the same on every machine, and may be saved
    repacks = False  # whether `repack` may find a better order
    calibrates = False  # whether levels may be chosen by data, and `grid` and `with_levels` exist
    bits: ClassVar[int]  # of a level, in those that calibrate
    is_coarse = False  # of so few bits that only the text layers are rounded to it

    @property
    def whole(self) -> tuple[int, int]:
        """Rows and columns that are not cut apart."""
        return 1, 1

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        """What holds a weight [rows, columns], by its names in a saved model."""
        raise NotImplementedError

    def nbytes(self, rows: int, columns: int, item_bytes: int) -> int:
        """Bytes of all tensors. item_bytes: of a number in the dtype of the model."""
        stored = self.tensors(rows, columns).values()
        return sum(_ITEM_BYTES.get(name, item_bytes) * math.prod(shape) for name, shape in stored)

    def fits(self, rows: int, columns: int) -> bool:  # noqa: ARG002
        """Whether a weight [rows, columns] has this form."""
        return True

    def check_device(self, device: torch.device) -> None:
        """Raises DeviceError where the format cannot be multiplied."""

    def quantize(self, weight: Tensor) -> tuple[*Held]:
        """Round `weight` [N, K], on its device."""
        raise NotImplementedError

    def grid(self, *held: *Held) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group, float32 [N, G]: w = (q - 2^(bits - 1)) · scale + zero."""
        raise NotImplementedError

    def with_levels(self, levels: Tensor, *held: *Held) -> tuple[*Held]:
        """`held` with other levels, uint8 [N, K]."""
        raise NotImplementedError

    def adopt(self, codes: Codes) -> tuple[*Held] | None:  # noqa: ARG002
        """What holds the codes of another program; None: nothing of this format does."""
        return None

    def widen(self, *held: *Held) -> Tensor:
        """The weight that is held, float32 [N, K]."""
        raise NotImplementedError

    def product(self, x: Tensor, *held: *Held) -> Tensor:
        """x · Wᵀ; x: [..., K] -> [..., N] in x's dtype."""
        if x.is_cpu and not kernels.ops.needs_gradient(x):
            return kernels.ops.run(self.operator, self.on_cpu, x, *held)
        return self.on_gpu(x, *held)

    def on_cpu(self, x: Tensor, *held: *Held) -> Tensor:
        """`product` by the best kernel of this machine; without one the weight is widened."""
        return kernels.ops.in_chunks(self.widen, x, *held)

    def on_gpu(self, x: Tensor, *held: *Held) -> Tensor:
        """`product` on all other devices, and where x needs a gradient."""
        return x @ self.widen(*held).to(x.dtype).T

    def repack(self, *held: *Held) -> tuple[Format, dict[str, Any]] | None:  # noqa: ARG002
        """The format and the tensors that this machine reads faster; None: `held` as they are."""
        return None

    def unpack(self, *held: *Held) -> dict[str, Any]:  # noqa: ARG002
        """Of a format that is not portable, the tensors that `repack` was given, to be saved."""
        raise RuntimeError("the weights are in this processor's order; load them anew to save")


def adopted_rows(codes: Codes, dtype: str) -> tuple[Tensor, Tensor] | None:
    """Levels of this dtype with one scale for each row; None if the codes are none."""
    one_scale = codes.zero is codes.large is None and codes.scale.shape[1] == 1
    fits = str(codes.levels.dtype) == f"torch.{dtype}" and one_scale
    return (codes.levels, codes.scale[:, 0].float()) if fits else None
