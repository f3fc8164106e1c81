"""How many tokens a second a model would write here, from speeds measured in this process.

A token is as slow as reading all weights that it uses. Large linear layers of each format are timed
on weights that no cache holds, and the model's bytes divided by the speed; keys, values and the
rest are read at the bandwidth of the memory. Launching kernels and sampling come on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmchat.hardware.bandwidth import Bandwidth, buffer_size, measure_bandwidth
from mmchat.nn.linear import Linear
from mmchat.nn.shapes_only import shapes_only
from mmchat.quant.formats.base import Format
from mmchat.quant.schemes import INT8, PLAIN, SCHEMES, Plan

if TYPE_CHECKING:
    from torch import nn

    from mmchat.estimate.memory import Setup

_COLUMNS, _ROWS = 4096, 4096  # of the smaller linear layers of the 11B
_ROUNDS, _SECONDS = 4, 0.7  # at least
USUAL_CONTEXT = 1024  # tokens in the cache


@dataclass(frozen=True)
class ReadingSpeeds:
    """Bytes a second: of memory, and of the weights of linear layers by format.

    linears: keys "none" (the dtype itself), "int8" and "int4".
    """

    bandwidth: Bandwidth
    linears: Mapping[str, float]


def measure_reading(device: torch.device, dtype: torch.dtype) -> ReadingSpeeds:
    """Time one row through linear layers of each format. Raises MemoryError_ without room."""
    bandwidth = measure_bandwidth(device)
    formats = (PLAIN, INT8, SCHEMES["int4"])
    return ReadingSpeeds(bandwidth, {f.name: _linear_speed(f, device, dtype) for f in formats})


@torch.inference_mode()
def _linear_speed(format: Format, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes of weights a second through layers that together exceed every cache."""
    one = format.nbytes(_ROWS, _COLUMNS, dtype.itemsize)
    layers = [_layer(format, device, dtype) for _ in range(1 + buffer_size(device) // one)]
    x = torch.ones(1, _COLUMNS, dtype=dtype, device=device)
    # one layer at a time disturbs a processor least; a GPU must be kept busy
    runs = [[layer] for layer in layers] if device.type == "cpu" else [layers]
    best, rounds, start = 0.0, 0, time.perf_counter()
    while rounds < _ROUNDS or time.perf_counter() - start < _SECONDS:
        best = max(best, *(one * len(run) / _seconds(run, x) for run in runs))
        rounds += 1
    return best


def _seconds(layers: Sequence[nn.Module], x: torch.Tensor) -> float:
    begin = time.perf_counter()
    y = x
    for layer in layers:
        y = layer(x)
    y[0, 0].item()  # waits for the device
    return time.perf_counter() - begin


def _layer(format: Format, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A linear layer whose weights are all ones or half of the largest; no page is shared."""
    with shapes_only():
        layer = Linear(_COLUMNS, _ROWS, bias=False, dtype=dtype)
        layer.set_format(format)
    for tensor in layer.to_empty(device=device).held():
        tensor.requires_grad_(False).fill_(1)
    return layer


def tokens_per_second(
    setup: Setup, speeds: ReadingSpeeds, *, pictures: bool, context: int = USUAL_CONTEXT
) -> float:
    """Of decoding with `context` tokens in the cache; pictures: after one of the largest size."""
    sizes, item = setup.sizes, setup.item_bytes
    plan = Plan(setup.quantize, setup.keep)
    seconds = 0.0
    for part, rows, columns in sizes.token_linears(pictures=pictures):
        name = plan.layer_format(part, rows, columns).name
        speed = speeds.linears["int8" if name in ("fp8", "int6") else name]  # which are alike
        seconds += setup.linear_bytes(part, rows, columns) / speed
    others = sizes.token_others(pictures=pictures) + sizes.cache_per_token * context
    others += sizes.picture_numbers(sizes.largest_picture) * pictures
    return 1 / (seconds + others * item / speeds.bandwidth.bytes_per_second)
