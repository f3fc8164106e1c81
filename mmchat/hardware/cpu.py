"""The processor: its name, its instruction sets and its caches, from the kernel's own files."""

from __future__ import annotations

import ctypes
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
# Instruction sets of ARM that kernels are written for, and what macOS calls them.
_ON_MACS = {
    "asimddp": b"hw.optional.arm.FEAT_DotProd",
    "i8mm": b"hw.optional.arm.FEAT_I8MM",
}
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
    present = processor_flags(root)
    return Cpu(
        model=model[1].strip() if model else platform.processor() or platform.machine(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in present),
        llc_bytes=_last_level_cache(root / "sys/devices/system/cpu/cpu0/cache"),
    )


def processor_flags(root: Path = Path("/")) -> frozenset[str]:
    """What the first processor has, in the words of /proc/cpuinfo, on a Mac those of _ON_MACS."""
    if platform.system() == "Darwin":
        library = ctypes.CDLL(None)
        return frozenset(name for name, key in _ON_MACS.items() if _sysctl(library, key))
    info = kernel_text(root / "proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M)
    return frozenset(flags[1].split()) if flags else frozenset()


def is_arm() -> bool:
    """Whether this is a 64-bit ARM processor."""
    return platform.machine() in ("aarch64", "arm64")


def is_amd(root: Path = Path("/")) -> bool:
    """Whether AMD made this processor."""
    info = kernel_text(root / "proc/cpuinfo")
    return bool(re.search(r"^vendor_id\s*: AuthenticAMD$", info, re.M))


def _sysctl(library: ctypes.CDLL, name: bytes) -> int:
    """A whole number that macOS holds under `name`; 0 where it does not know it."""
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    failed = library.sysctlbyname(
        name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return 0 if failed else value.value


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
