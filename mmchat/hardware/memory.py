"""How much memory there is and how much of it can still be had, within every container's limit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.hardware.cpu import kernel_text

if TYPE_CHECKING:
    import torch

_ROOT = Path("/")
# Of each version of control groups: its limits, what is in use, how its statistics begin.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ""),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
}
_NO_LIMIT = 2**60  # version 1 says "no limit" with a number of about 2**63


@dataclass(frozen=True)
class HostMemory:
    """Main memory in bytes, of the machine or within one control group; swap does not count.

    total: of the machine, or the container's limit if that is lower. available: what can still be
    had, the page cache included, since it is given up on demand. limited_by: the cgroup folder
    whose limit decides `available`, None if the machine does.
    """

    total: int
    available: int
    limited_by: Path | None = None


def host_memory(root: Path = _ROOT) -> HostMemory | None:
    """Main memory of this machine, as its containers leave it; None where it cannot be known.

    root: where `proc` and `sys` are. Reads the limits of the process's control group and of all
    groups above it, of either version: memory.max and memory.high, or memory.limit_in_bytes.
    """
    machine = _machine(root)
    if machine is None:
        return None
    total, available, decides = *machine, None
    for group in _limits(root):
        total = min(total, group.total)
        if group.available < available:
            available, decides = group.available, group.limited_by
    return HostMemory(total, max(available, 0), decides)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on `device`, or None where that cannot be known."""
    import torch

    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What torch holds and does not use is free to it as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        most = torch.mps.recommended_max_memory()
        return max(most - torch.mps.driver_allocated_memory(), 0)
    host = host_memory()
    return None if host is None else host.available


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far in bytes: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Linux hands getrusage's figure on to the programs that a process starts; this one begins anew.
    own = _table(_ROOT / "proc/self/status").get("VmHWM:")
    if own is not None:
        return own * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give the system back what was freed and is kept for later, where GNU's C library keeps it.

    It keeps blocks of up to 32 MiB (M_MMAP_THRESHOLD of mallopt(3)). This takes some ms.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def _machine(root: Path) -> tuple[int, int] | None:
    """(total, available) without containers: from /proc/meminfo, or else what POSIX knows."""
    info = _table(root / "proc/meminfo")
    if {"MemTotal:", "MemAvailable:"} <= info.keys():
        return info["MemTotal:"] * 1024, info["MemAvailable:"] * 1024
    if {"SC_PHYS_PAGES", "SC_AVPHYS_PAGES"} <= os.sysconf_names.keys():
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return None


def _limits(root: Path) -> Iterator[HostMemory]:
    """The process's control group and those above it, as far as they are visible."""
    paths = dict(_own_groups(root))
    for mount in kernel_text(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = mount.partition(" - ")
        kind, _, options = rest.partition(" ")
        words = fields.split()
        if len(words) < 5 or kind not in paths:
            continue
        if kind == "cgroup" and "memory" not in options.split()[-1].split(","):
            continue
        top = root / words[4].lstrip("/")
        for folder in _upwards(top, _inside(paths[kind], words[3])):
            found = _limit(folder, *_FILES[kind])
            if found is not None:
                yield found


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """(kind of mount, path of this process's group in it): `0::/a/b`, `4:memory:/a/b`."""
    for line in kernel_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _inside(path: str, mounted: str) -> str:
    """A group's path below the mount point, where the mount shows the group `mounted` as its top.

    A container may see only its own group, while the kernel names the path from the host's top.
    """
    if mounted != "/" and (path == mounted or path.startswith(f"{mounted}/")):
        path = path.removeprefix(mounted)
    return "/".join(part for part in path.split("/") if part not in ("", ".", ".."))


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it up to the mount point; only those that are there."""
    folder = top / path
    while folder != top:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    yield top


def _limit(folder: Path, names: tuple[str, ...], use: str, prefix: str) -> HostMemory | None:
    """None without a limit. File pages and slabs that can be given up do not count as used."""
    limits, used = [_number(folder / name) for name in names], _number(folder / use)
    given = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    if not given or used is None:
        return None
    stat = _table(folder / "memory.stat")
    names = (f"{prefix}inactive_file", f"{prefix}active_file", "slab_reclaimable")
    reclaimable = sum(stat.get(name, 0) for name in names)
    dirty = sum(stat.get(f"{prefix}{name}", 0) for name in ("dirty", "writeback"))
    dirty += sum(stat.get(name, 0) for name in ("file_dirty", "file_writeback"))
    used -= max(reclaimable - dirty, 0)
    return HostMemory(min(given), min(given) - max(used, 0), folder)


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none, as for "max"."""
    text = kernel_text(path).strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """First and second word of each line, where the second is a number."""
    rows = (line.split() for line in kernel_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
