"""How fast this machine reads memory: what bounds the decoding of one token after another."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.errors import MemoryError_
from mmchat.hardware.cpu import describe_cpu
from mmchat.hardware.memory import available_memory
from mmchat.limits import MIB

if TYPE_CHECKING:
    import torch

ROUNDS = 8
_COLUMNS = 4096
_SLICES = 8
_LEAST_BUFFER = 256 * MIB
_MOST_BUFFER = 1024 * MIB
_ACCELERATOR_BUFFER = 2048 * MIB


@dataclass(frozen=True)
class Bandwidth:
    """Reading speed of one device: the best of many readings within `buffer_bytes`.

    threads: those of the processor that read; 1 for an accelerator.
    """

    bytes_per_second: float
    buffer_bytes: int
    threads: int


def measure_bandwidth(
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    buffer_bytes: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Bandwidth:
    """Read a buffer that no cache holds, with all threads of torch: its sum, and a product with it.

    It is read slice by slice and the quickest slice counts, so that other programs disturb little.
    buffer_bytes: at least twice the last-level cache if left out, within a quarter of what is free.
    clock: in seconds; on one thread time.process_time leaves out what other programs take.
    Raises MemoryError_ if the buffer cannot be had.
    """
    import torch

    rows = max((buffer_bytes or buffer_size(device)) // (4 * _COLUMNS), 1)
    try:
        # Ones, not empty: every page is touched, and none is the kernel's shared zero page.
        buffer = torch.ones(rows, _COLUMNS, dtype=torch.float32, device=device)
    except (torch.OutOfMemoryError, RuntimeError):
        wanted = rows * _COLUMNS * 4 // MIB
        raise MemoryError_(f"{device} has no {wanted} MiB free to measure its bandwidth") from None
    vector = torch.ones(_COLUMNS, device=device)
    slices = buffer.split(-(-rows // _SLICES)) if device.type == "cpu" else (buffer,)
    best = min(
        _seconds(read, device, clock) / part.nbytes
        for _ in range(rounds)
        for reader in (_sum, torch.mv)
        for part in slices
        for read in (functools.partial(reader, part, vector),)
    )
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return Bandwidth(1 / best, buffer.nbytes, threads)


def _sum(buffer: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """In float64 where there is that: half the additions to hide behind the reading."""
    import torch

    return (buffer if buffer.device.type == "mps" else buffer.view(torch.float64)).sum()


def buffer_size(device: torch.device) -> int:
    """Bytes that no cache of the device holds, within a quarter of what is free."""
    size = _ACCELERATOR_BUFFER
    if device.type == "cpu":
        cache = describe_cpu().llc_bytes or 0
        size = min(max(_LEAST_BUFFER, 2 * cache), _MOST_BUFFER)
    free = available_memory(device)
    return size if free is None else min(size, max(free // 4, MIB))


def _seconds(read: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of `read`, with what it queues on the device."""
    import torch

    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        read()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = clock()
    read()
    if device.type == "mps":
        torch.mps.synchronize()
    return clock() - start
