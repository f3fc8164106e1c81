"""Facts about the machine that decide what runs on it, and how fast."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

import mmchat
from mmchat.checkpoints.hub_cache import cache_folder
from mmchat.errors import DiskError, MemoryError_
from mmchat.estimate.speed import BusyError, ReadingSpeeds, measure_reading
from mmchat.hardware.cpu import describe_cpu
from mmchat.hardware.memory import available_memory, host_memory
from mmchat.hardware.placement import choose_placement
from mmchat.quant.kernels import ops
from mmchat.storage.space import free_bytes

LARGE = 10**10  # parameters of a model whose dtype is chosen as for the large ones


@dataclass(frozen=True)
class Device:
    """A device that torch can use. total, available: bytes of its memory; None if unknown."""

    name: str
    model: str
    total: int | None
    available: int | None


@dataclass(frozen=True)
class Machine:
    """The first device is the one that `--device auto` takes, `dtype` what `--dtype auto` takes.

    limited_by: what bounds the memory of the processor if not the machine. load: processes that
    want to run, on average over the last minute. reading: how fast weights are read on the first
    device; unmeasured: why there is no `reading`. disk_free: bytes left for the Hub's cache. None
    for what is not known.
    """

    cores: int
    threads: int
    load: float | None
    limited_by: str | None
    devices: tuple[Device, ...]
    dtype: str
    reading: ReadingSpeeds | None
    kernels: tuple[ops.Choice, ...]
    cache: str
    disk_free: int | None
    versions: dict[str, str | None]
    unmeasured: str | None = None

    @property
    def device(self) -> Device:
        return self.devices[0]


def examine(progress: Callable[[str], None]) -> Machine:
    """Look at everything and measure how fast weights are read."""
    progress("measuring the memory")
    placement = choose_placement("auto", "auto", LARGE)
    # those that this process may run on
    is_told = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    host = host_memory()
    reading, disk_free, unmeasured = None, None, None
    try:
        reading = measure_reading(placement.device, placement.dtype)
    except MemoryError_:
        unmeasured = "too little memory is free"
    except BusyError:
        unmeasured = "busy, no figure"
    with suppress(DiskError):
        disk_free = free_bytes(cache_folder())
    return Machine(
        cores=cores,
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        limited_by=str(host.limited_by) if host and host.limited_by else None,
        devices=tuple(map(_describe, [*devices, torch.device("cpu")])),
        dtype=str(placement.dtype).removeprefix("torch."),
        reading=reading,
        kernels=tuple(ops.probe()),
        cache=str(cache_folder()),
        disk_free=disk_free,
        versions={
            "mmchat": mmchat.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        unmeasured=unmeasured,
    )


def _describe(device: torch.device) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        model = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        total = properties.total_memory
    elif device.type == "mps":
        model, total = "Apple GPU", torch.mps.recommended_max_memory()
    else:
        host = host_memory()
        model, total = describe_cpu().model, host.total if host else None
    return Device(str(device), model, total, available_memory(device))
