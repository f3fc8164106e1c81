"""Round weights by what their layer reads: each column's error is made up for by those to come.

Source: Frantar et al. 2023, GPTQ. Scales and zeros are those of rounding without data; the levels
are chosen column by column, those of the strongest inputs first, so that X·Wᵀ changes least.
"""

from __future__ import annotations

from functools import cached_property
from typing import TypeVarTuple

import torch
from torch import Tensor

from mmchat.errors import NumericalError
from mmchat.quant.formats.base import Format

DAMPING = 0.01, 0.1, 1.0  # of the mean of the diagonal: what is tried until there is a factor
BLOCK = 128  # columns whose errors are handed on to the others together
CHUNK = 4096  # inputs of which there is a float32 copy
Held = TypeVarTuple("Held")


class Gram:
    """Xᵀ·X of all that layers of one input [..., K] read: `sums`, float32 [K, K], until the factor
    is asked for, which takes their place."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, width, device=device)

    def add(self, x: Tensor) -> None:
        for chunk in x.reshape(-1, x.shape[-1]).split(CHUNK):
            wide = chunk.float()
            self.sums.addmm_(wide.T, wide)

    @cached_property
    def factor(self) -> tuple[Tensor, Tensor]:
        """Columns by rising strength, [K], and the lower Cholesky factor of the sums in that order.

        Raises NumericalError.
        """
        sums = self.__dict__.pop("sums")
        strength = sums.diagonal().clone()  # a view would keep the sums
        order = strength.argsort(stable=True)
        mean = strength.mean().clamp(min=torch.finfo(torch.float32).tiny)
        sums = sums[order]
        sums = sums[:, order]
        added = 0.0
        for share in DAMPING:
            sums.diagonal().add_((share - added) * mean)
            added = share
            lower, failed = torch.linalg.cholesky_ex(sums)
            if not failed and lower.diagonal().isfinite().all():
                return order, lower
        raise NumericalError(
            "what a layer reads of the samples is infinite or no number; try --dtype float32"
        )


def quantize(format: Format[*Held], weight: Tensor, gram: Gram) -> tuple[*Held]:
    """Round `weight` [N, K] to a format that `calibrates`, for inputs with these products."""
    held = format.quantize(weight)
    scale, zero = (part.T.contiguous() for part in format.grid(*held))
    inverse = torch.where(scale.abs() >= torch.finfo(torch.float32).tiny, 1 / scale, 0)
    order, lower = gram.factor
    group, most = weight.shape[1] // len(scale), 2 ** (format.bits - 1)
    rest = weight.float().T[order]  # column by column, what is still to be rounded
    levels = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    errors = rest.new_empty(BLOCK, rest.shape[1])
    columns = order.tolist()
    for end in range(len(columns), 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        # rows of the inverse of `lower`: how a column's error is shared among those before it
        unit = torch.eye(end, device=rest.device)[begin:]
        shared = torch.linalg.solve_triangular(lower[:end, :end], unit, upper=False, left=False)
        for at in reversed(range(begin, end)):
            of, column = columns[at] // group, at - begin
            level = ((rest[at] - zero[of]) * inverse[of]).nan_to_num(nan=0)
            level = level.clamp(-most, most - 1).round()
            levels[columns[at]] = level + most
            error = (rest[at] - level * scale[of] - zero[of]) / shared[column, at]
            rest[begin:at].addr_(shared[column, begin:at], error, alpha=-1)
            errors[column] = error
        rest[:begin].addmm_(shared[:, :begin].T, errors[: end - begin], alpha=-1)
    return format.with_levels(levels.T.contiguous(), *held)
