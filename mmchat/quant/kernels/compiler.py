"""How the C kernels are compiled: on first use for this machine, or into a wheel for any.

hatch_build.py runs this file where neither mmchat nor torch is installed: it imports nothing but
Python's own.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = (
    "linear.c",
    "blocks.c",
    "attention.c",
    "attention_many.c",
    "quantize.c",
    "blocks_rounding.c",
)
HEADERS = (
    "bfloat16.h",
    "products.h",
    "panels.h",
    "blocks.h",
    "linear_neon.h",
    "attention_neon.h",
)
IS_MAC = platform.system() == "Darwin"
# Apple's clang has OpenMP, though its driver does not know the word.
_OPENMP = ("-Xclang", "-fopenmp") if IS_MAC else ("-fopenmp",)
# Not -ffast-math, which may take NaN for impossible: NaN and infinity must be carried through.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", *_OPENMP, "-fPIC")
COMPILE_SECONDS = 600  # 5 s on an idle machine


class Variant(NamedTuple):
    """Kernels for one set of instructions. needs: what the processor must have for it."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


def arm_flags(features: Collection[str]) -> tuple[str, ...]:
    """For an ARM processor with these of hardware.cpu.processor_flags, as gcc and clang take them.

    Apple's clang knows no -march=native.
    """
    if "asimddp" not in features:
        return ("-march=armv8-a",)
    return ("-march=armv8.2-a+dotprod" + "+i8mm" * ("i8mm" in features),)


def _arm(name: str, *features: str) -> Variant:
    return Variant(name, frozenset(features), arm_flags(features))


def _x86(name: str, needs: str, *flags: str) -> Variant:
    return Variant(name, frozenset(needs.split()), flags)


# What a wheel holds for each machine, the best first; `needs` are words of /proc/cpuinfo.
_V2 = "ssse3 sse4_1 sse4_2 popcnt"
_V3 = f"{_V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
_VNNI = "-march=x86-64-v4", "-mavx512vnni"
VARIANTS = {
    "x86_64": (
        _x86("amx", f"{_V4} avx512_vnni amx_tile amx_int8", *_VNNI, "-mamx-tile", "-mamx-int8"),
        _x86("avx512vnni", f"{_V4} avx512_vnni", *_VNNI),
        _x86("avxvnni", f"{_V3} avx_vnni", "-march=x86-64-v3", "-mavxvnni"),
        _x86("avx2", _V3, "-march=x86-64-v3"),
        _x86("portable", _V2, "-march=x86-64-v2"),
    ),
    "aarch64": (
        _arm("i8mm", "asimddp", "i8mm"),
        _arm("dotprod", "asimddp"),
        _arm("neon"),
    ),
}


def compile_kernels(
    compiler: str, flags: Sequence[str], sources: Path, target: Path, libraries: Sequence[str] = ()
) -> None:
    """Write the shared library `target` of the C files in the folder `sources`.

    Other files may stay beside it. Raises OSError or subprocess.SubprocessError.

    The link does not name OpenMP's runtime: it is torch's own, already in the process under a name
    that differs between torch's wheels, so that threads are shared and none need be installed.
    """
    objects = [f"{Path(name).stem}.o" for name in SOURCES]
    for command in (
        [compiler, *flags, "-c", *(str(sources.resolve() / name) for name in SOURCES)],
        [compiler, "-shared", *objects, *libraries, "-lm", "-s", "-o", target.name],
    ):
        subprocess.run(  # noqa: S603
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            cwd=target.parent,
            # what a killed compiler leaves goes with the folder
            env={**os.environ, "TMPDIR": str(target.parent.resolve())},
        )
