"""The processor: its name, its instruction sets and its caches, from the kernel's own files."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that matrix kernels ask for, by the names in /proc/cpuinfo.
ISA_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_UNIT = {"K": 1024, "M": 1024**2, "G": 1024**3}


@dataclass(frozen=True)
class Cpu:
    """model: as the maker calls it. isa: those of ISA_FLAGS that it has. llc_bytes: last-level
    cache that one core sees, None where unknown."""

    model: str
    isa: tuple[str, ...]
    llc_bytes: int | None


def describe_cpu(root: Path = Path("/")) -> Cpu:
    """The first processor of this machine; root: where `proc` and `sys` are."""
    info = kernel_text(root / "proc/cpuinfo")
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M)
    present = set(flags[1].split()) if flags else set()
    return Cpu(
        model=model[1].strip() if model else platform.processor() or platform.machine(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in present),
        llc_bytes=_last_level_cache(root / "sys/devices/system/cpu/cpu0/cache"),
    )


def processor_identity(root: Path = Path("/")) -> str:
    """Changes with the model and with any instruction set: what native code was compiled for."""
    kept = ("model name", "flags", "Features", "CPU part")
    lines = kernel_text(root / "proc/cpuinfo").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(kept)})) or (
        platform.processor()
    )


def _last_level_cache(folder: Path) -> int | None:
    """Bytes of the cache with the highest level."""
    best: tuple[int, int] | None = None
    for index in folder.glob("index*"):
        level = kernel_text(index / "level").strip()
        size = re.fullmatch(r"(\d+)([KMG]?)", kernel_text(index / "size").strip())
        if level.isdigit() and size:
            found = (int(level), int(size[1]) * _UNIT.get(size[2], 1))
            best = max(best, found) if best else found
    return best[1] if best else None


def kernel_text(path: Path) -> str:
    """A file of the kernel's; empty if it has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
