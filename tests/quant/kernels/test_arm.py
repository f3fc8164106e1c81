"""The C kernels of ARM, cross-compiled and run by an emulator, against plain integer arithmetic."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmchat.quant.kernels import compiler
from mmchat.quant.kernels.compiler import FLAGS, arm_flags

CROSS, EMULATOR, DISASSEMBLER = (
    "aarch64-linux-gnu-gcc",
    "qemu-aarch64",
    "aarch64-linux-gnu-objdump",
)
CHECKS = Path(__file__).with_name("plain_products.c")
LIBRARIES = "/usr/aarch64-linux-gnu"  # of the emulated processor
SOURCES = Path(compiler.__file__).parent
KERNELS = [SOURCES / name for name in compiler.SOURCES if name != "quantize.c"]
# instruction sets: their name, a processor that has them and no more, an instruction of the last
CPUS = {
    (): ("NEON", "cortex-a72", "smlal2"),
    ("asimddp",): ("NEON dotprod", "cortex-a76", "sdot"),
    ("asimddp", "i8mm"): ("NEON i8mm", "max", "smmla"),
}
QUIET = {
    **os.environ,
    "OMP_WAIT_POLICY": "passive",
}  # threads that wait leave the emulator its core

needs_emulator = pytest.mark.skipif(
    not all(map(shutil.which, (CROSS, EMULATOR, DISASSEMBLER))),
    reason="NOT TESTED: the kernels of ARM need gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and"
    " qemu-user",
)
needs_clang = pytest.mark.skipif(
    not shutil.which("clang"), reason="NOT TESTED: the kernels of ARM by clang, which is not here"
)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def check(features: tuple[str, ...], folder: Path, *kernels: Path) -> None:
    """Run the checks on a processor with `features`, with kernels that were compiled for it."""
    name, cpu, _ = CPUS[features]
    text = "".join(run(DISASSEMBLER, "-d", path) for path in kernels)
    used = {
        known: bool(re.search(rf"\b{mnemonic}\b", text)) for known, (*_, mnemonic) in CPUS.items()
    }
    assert used[features]
    assert not any(used[more] for more in CPUS if len(more) > len(features))
    found = f"-Wl,-rpath,{folder}"
    run(CROSS, "-O3", "-fopenmp", CHECKS, *kernels, "-lm", found, "-o", folder / "checks")
    instructions, _, *faults, count = run(
        EMULATOR, "-L", LIBRARIES, "-cpu", cpu, folder / "checks"
    ).splitlines()
    assert instructions == name
    assert faults == []
    assert int(count.split()[0]) > 100_000


@pytest.mark.slow
@needs_emulator
@needs_clang
@pytest.mark.parametrize("features", [("asimddp",), ("asimddp", "i8mm")])
def test_clang_which_macos_has_compiles_them_as_well(
    features: tuple[str, ...], tmp_path: Path
) -> None:
    """Run without OpenMP, whose library for ARM is not here; compiled with it too."""
    clang = ("clang", "--target=aarch64-linux-gnu")
    plain = [flag for flag in FLAGS if flag != "-fopenmp"]
    objects = [tmp_path / f"{source.stem}.o" for source in KERNELS]
    for source, target in zip(KERNELS, objects, strict=True):
        run(*clang, *plain, *arm_flags(features), "-c", source, "-o", target)
    check(features, tmp_path, *objects)
    for source in KERNELS:
        openmp = ("-Xclang", "-fopenmp", "-O1", *arm_flags(features))
        run(*clang, *openmp, "-c", source, "-o", tmp_path / "openmp.o")


def test_the_flags_say_what_the_processor_has() -> None:
    assert arm_flags(()) == ("-march=armv8-a",)
    assert arm_flags(("i8mm",)) == ("-march=armv8-a",)
    assert arm_flags(("asimddp",)) == ("-march=armv8.2-a+dotprod",)
    assert arm_flags(("asimddp", "i8mm")) == ("-march=armv8.2-a+dotprod+i8mm",)
