"""Facts about the machine and about what is installed on it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import platformdirs
import torch

import mmchat
from mmchat.checkpoints.hub_cache import cache_folder
from mmchat.errors import DiskError, MemoryError_
from mmchat.estimate.speed import ReadingSpeeds, measure_reading
from mmchat.hardware.compilers import Compiler, find_compilers
from mmchat.hardware.compute import product_rates
from mmchat.hardware.cpu import Cpu, describe_cpu
from mmchat.hardware.memory import HostMemory, available_memory, host_memory
from mmchat.hardware.placement import choose_placement
from mmchat.hub.places import free_bytes
from mmchat.quant.kernels import ops

LARGE = 10**10  # parameters of a model whose dtype is chosen as for the large ones
PACKAGES = ("torch", "numpy", "huggingface_hub", "tiktoken", "pillow")
# extra -> (what it brings, the module that shows that it is there)
EXTRAS = {
    "heif": ("pictures in HEIC, as phones write them", "pillow_heif"),
    "tokenizers": ("tokenizer.json files of any kind", "tokenizers"),
    "clipboard": ("copying answers with \\copy", "pyperclip"),
    "bench": ("mmchat bench --vs transformers", "transformers"),
    "executorch": ("mmchat export --format executorch, and running it", "executorch"),
}


@dataclass(frozen=True)
class Device:
    """A device that torch can use. total, available: bytes of its memory; None if unknown.

    products: multiplications and additions a second of matrix products, by dtype.
    """

    name: str
    model: str
    total: int | None
    available: int | None
    products: dict[str, float]

    @property
    def fast_dtypes(self) -> list[str]:
        """Those at least as fast as float32, nearly."""
        least = 0.8 * self.products.get("float32", 0.0)
        return [dtype for dtype, rate in self.products.items() if rate >= least]


@dataclass(frozen=True)
class Cache:
    """A folder that grows and can be deleted. free: bytes left on its disk, None if unknown."""

    name: str
    path: str
    bytes: int
    free: int | None


@dataclass(frozen=True)
class Machine:
    """The first device is the one that `--device auto` takes, `dtype` what `--dtype auto` takes.

    reading: how fast weights are read on it, None if that could not be measured. load: processes
    that want to run, on average over the last minute. extras: name -> whether it is installed.
    """

    cpu: Cpu
    cores: int
    threads: int
    load: float | None
    host: HostMemory | None
    devices: tuple[Device, ...]
    dtype: str
    reading: ReadingSpeeds | None
    kernels: tuple[ops.Choice, ...]
    compilers: tuple[Compiler, ...]
    caches: tuple[Cache, ...]
    versions: dict[str, str | None]
    extras: dict[str, bool]

    @property
    def device(self) -> Device:
        return self.devices[0]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = asdict(self)
        facts["cpu"]["isa"] = list(self.cpu.isa)
        facts["devices"] = [
            {**asdict(device), "fast_dtypes": device.fast_dtypes} for device in self.devices
        ]
        if self.host and self.host.limited_by:
            facts["host"]["limited_by"] = str(self.host.limited_by)
        facts["extras"] = {
            name: {"installed": present, "brings": EXTRAS[name][0]}
            for name, present in self.extras.items()
        }
        return facts


def examine(progress: Callable[[str], None]) -> Machine:
    """Look at everything and measure memory and products."""
    progress("looking at the machine")
    placement = choose_placement("auto", "auto", LARGE)
    host = host_memory()
    progress("measuring matrix products")
    described = tuple(_describe(device, host) for device in _devices())
    progress("measuring the memory")
    try:
        reading = measure_reading(placement.device, placement.dtype)
    except MemoryError_:
        reading = None
    return Machine(
        cpu=describe_cpu(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        host=host,
        devices=described,
        dtype=str(placement.dtype).removeprefix("torch."),
        reading=reading,
        kernels=tuple(ops.probe()),
        compilers=tuple(find_compilers()),
        caches=tuple(_caches()),
        versions=_versions(),
        extras={name: find_spec(module) is not None for name, (_, module) in EXTRAS.items()},
    )


def _cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[torch.device]:
    """Every CUDA device, MPS, the processor; the first is the one that is used unasked."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return [*devices, torch.device("cpu")]


def _describe(device: torch.device, host: HostMemory | None) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        model = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        total, free = properties.total_memory, available_memory(device)
    elif device.type == "mps":
        model = "Apple GPU"
        total, free = torch.mps.recommended_max_memory(), available_memory(device)
    else:
        model = describe_cpu().model
        total, free = (host.total, host.available) if host else (None, None)
    return Device(str(device), model, total, free, product_rates(device))


def _caches() -> Iterator[Cache]:
    """That of the Hub, with what all its users put there, and each of mmchat's own."""
    places = {"Hugging Face": cache_folder()}
    own = platformdirs.user_cache_path("mmchat", appauthor=False)
    if own.is_dir():
        places |= {f"mmchat {path.name}": path for path in sorted(own.iterdir()) if path.is_dir()}
    for name, path in places.items():
        try:
            free = free_bytes(path)
        except DiskError:
            free = None
        yield Cache(name, str(path), _bytes_below(path), free)


def _bytes_below(folder: Path) -> int:
    """Bytes of the files below `folder`, links not followed; what cannot be read is left out."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total


def _versions() -> dict[str, str | None]:
    """Of mmchat, Python and the packages it stands on; None where one is missing."""
    versions: dict[str, str | None] = {
        "mmchat": mmchat.__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["cuda"] = torch.version.cuda
    return versions
