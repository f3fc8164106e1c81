"""Whether two contestants say the same: compared before anything is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmchat.errors import MmchatError

# Largest relative error (L2) of logits that two right computations may differ by.
SAME_DTYPE_LIMITS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
QUANTIZED_LIMITS = {8: 0.15, 4: 0.8}  # by bits per weight; of random weights, which are the worst


class DisagreementError(MmchatError):
    """A contestant computes something else, so that its speed means nothing."""


@dataclass(frozen=True)
class Agreement:
    """How far logits are from those expected.

    relative_error: L2 norm of the difference by that of the expected logits. kl: divergence in
    nats of the expected distribution from this one, the mean of all rows. top1: the same most
    probable token in each.
    """

    relative_error: float
    kl: float
    top1: bool


def compare(logits: Tensor, expected: Tensor) -> Agreement:
    """logits, expected: [rows, V]."""
    ours, theirs = logits.double().cpu(), expected.double().cpu()
    error = float((ours - theirs).norm() / theirs.norm())
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean())
    return Agreement(error, max(0.0, kl), torch.equal(ours.argmax(-1), theirs.argmax(-1)))


def check(found: Agreement, limit: float, *, name: str, against: str, workload: str) -> None:
    """Raise DisagreementError if the error is over `limit` or not a number."""
    if math.isfinite(found.relative_error) and found.relative_error <= limit:
        return
    raise DisagreementError(
        f"{workload}: the logits of {name} are {found.relative_error:.2g} (relative) away from"
        f" those of {against}, over the limit of {limit:g}; nothing was timed"
    )
