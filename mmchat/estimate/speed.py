"""How many tokens a second a model would write here, from speeds measured in this process.

A token is as slow as reading all weights that it uses. Large linear layers of each format are timed
on weights that no cache holds, and the model's bytes divided by the speed; keys, values and the
rest are read at the bandwidth of the memory. Launching kernels and sampling come on top.

Where other programs take the processor, no clock tells what it could do. One thread's own time
does: with all threads it is no slower, or they were kept waiting and there is no figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
_MOST_SECONDS = 4.0
_STEADY = 0.7  # of the best of a speed, at least, are the two next ones of a figure that holds
USUAL_CONTEXT = 1024  # tokens in the cache


class BusyError(Exception):
    """Other programs leave too little of the machine to measure it."""


@dataclass(frozen=True)
class ReadingSpeeds:
    """Bytes a second: of memory, and of the weights of linear layers by format.

    linears: keys "none" (the dtype itself), "int8" and "int4".
    """

    bandwidth: Bandwidth
    linears: Mapping[str, float]


def measure_reading(device: torch.device, dtype: torch.dtype) -> ReadingSpeeds:
    """Time one row through linear layers of each format. Raises MemoryError_ without room.

    Raises BusyError where one format's speed would be no figure to rely on.
    """
    bandwidth = measure_bandwidth(device)
    formats = (PLAIN, INT8, SCHEMES["int4"])
    linears = {f.name: _linear_speed(f, device, dtype) for f in formats}
    at_least = max(bandwidth.bytes_per_second, *linears.values())  # as fast as weights were read
    return ReadingSpeeds(replace(bandwidth, bytes_per_second=at_least), linears)


@torch.inference_mode()
def _linear_speed(format: Format, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes of weights a second through layers that together exceed every cache."""
    one = format.nbytes(_ROWS, _COLUMNS, dtype.itemsize)
    layers = [_layer(format, device, dtype) for _ in range(1 + buffer_size(device) // one)]
    x = torch.ones(1, _COLUMNS, dtype=dtype, device=device)
    # one layer at a time disturbs a processor least; a GPU must be kept busy
    runs = [[layer] for layer in layers] if device.type == "cpu" else [layers]
    alone = _speed_of_one_thread(layers, x, one) if device.type == "cpu" else 0.0
    speeds: list[float] = []
    rounds, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _MOST_SECONDS:
        speeds += (one * len(run) / _seconds(run, x) for run in runs)
        speeds = sorted(speeds, reverse=True)[:3]
        rounds += 1
        is_steady = speeds[0] >= alone and speeds[-1] >= _STEADY * speeds[0]
        if rounds >= _ROUNDS and passed >= _SECONDS and is_steady:
            return speeds[0]
    raise BusyError


def _speed_of_one_thread(layers: Sequence[nn.Module], x: torch.Tensor, nbytes: int) -> float:
    """By its own processor time, which does not count what other programs take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return max(nbytes / _seconds([layer], x, time.thread_time) for layer in layers)
    finally:
        torch.set_num_threads(threads)


def _seconds(
    layers: Sequence[nn.Module], x: torch.Tensor, clock: Callable[[], float] = time.perf_counter
) -> float:
    begin = clock()
    y = x
    for layer in layers:
        y = layer(x)
    y[0, 0].item()  # waits for the device
    return clock() - begin


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
    others = sizes.token_others(pictures=pictures) * item + setup.position_bytes * context
    others += setup.picture_bytes(sizes.largest_picture) * pictures
    return 1 / (seconds + others / speeds.bandwidth.bytes_per_second)
