"""How fast a device multiplies matrices in each dtype: what bounds vision and long prompts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_SIDE = {"cpu": 384, "cuda": 4096, "mps": 2048}
_SECONDS = 0.15


def product_rates(device: torch.device) -> dict[str, float]:
    """Multiplications and additions a second of square matrix products, by dtype.

    The dtypes that the device cannot multiply are left out. About a second in all.
    """
    import torch

    side = _SIDE[device.type]
    rates = {}
    for name in DTYPES:
        try:
            matrix = torch.ones(side, side, dtype=getattr(torch, name), device=device)
            rates[name] = 2 * side**3 / _best_seconds(matrix)
        except RuntimeError:
            continue
    return rates


def _best_seconds(matrix: torch.Tensor) -> float:
    """The quickest of the products made in _SECONDS, at least two: the first one prepares."""
    best, rounds, start = float("inf"), 0, time.perf_counter()
    while rounds < 2 or time.perf_counter() - start < _SECONDS:
        begin = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best, rounds = min(best, time.perf_counter() - begin), rounds + 1
    return best
