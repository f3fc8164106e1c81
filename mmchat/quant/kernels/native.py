"""Compile the C kernels once and keep them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

import torch

from mmchat.errors import DiskError
from mmchat.hardware import kept_code
from mmchat.hardware.cpu import arm_features, is_arm, processor_identity
from mmchat.progress import ProgressCallback
from mmchat.quant.kernels import self_check
from mmchat.quant.kernels.library import Library, UnavailableError
from mmchat.storage.atomic_file import write_text

SOURCES = ("linear.c", "blocks.c", "attention.c", "quantize.c", "blocks_rounding.c")
HEADERS = ("bfloat16.h", "products.h", "blocks.h", "linear_neon.h", "attention_neon.h")


def arm_flags(features: Collection[str]) -> tuple[str, ...]:
    """For an ARM processor with these of hardware.cpu.arm_features, as gcc and clang take them.

    Apple's clang knows no -march=native.
    """
    if "asimddp" not in features:
        return ("-march=armv8-a",)
    return ("-march=armv8.2-a+dotprod" + "+i8mm" * ("i8mm" in features),)


_IS_MAC = platform.system() == "Darwin"
# Apple's clang has OpenMP, though its driver does not know the word.
_OPENMP = ("-Xclang", "-fopenmp") if _IS_MAC else ("-fopenmp",)
_MACHINE = arm_flags(arm_features()) if is_arm() else ("-march=native",)
# Not -ffast-math, which may take NaN for impossible: NaN and infinity must be carried through.
_FLAGS = ("-O3", *_MACHINE, "-fno-math-errno", "-fno-trapping-math", *_OPENMP, "-fPIC")
_COMPILE_SECONDS = 600  # 5 s on an idle machine


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where they cannot be had; `reason` says why."""
    return _load()[0]


def reason() -> str:
    """One clause: what the kernels use, or why there are none."""
    return _load()[1]


def is_wanted() -> bool:
    """Whether there should be kernels: where they are built, unless the user switches them off."""
    return _is_built_here() and os.environ.get("MMCHAT_NATIVE_KERNELS", "1") != "0"


def _is_built_here() -> bool:
    return platform.system() == "Linux" or (_IS_MAC and is_arm())


def prepare(progress: ProgressCallback | None = None) -> None:
    """Compile the kernels now if that is still to be done, so that `progress` can tell of it."""
    try:
        if kept_code.find(cache_folder(), _fingerprint(_compiler()), ".so"):
            return
    except UnavailableError:
        return
    if progress:
        progress("kernels", 0, 1)
    if library() and progress:
        progress("kernels", 1, 1)


@functools.cache
def _load() -> tuple[Library | None, str]:
    try:
        found = _checked(_compiled(), briefly=True)
    except UnavailableError as error:
        return None, str(error)
    return found, f"compiled for this machine, {found.instructions}"


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    import platformdirs

    return platformdirs.user_cache_path("mmchat", appauthor=False) / "kernels"


def _compiler() -> str:
    if not _is_built_here():
        raise UnavailableError(f"not built on {platform.system()}")
    if not is_wanted():
        raise UnavailableError("switched off by MMCHAT_NATIVE_KERNELS=0")
    compiler = shutil.which(os.environ.get("CC") or ("clang" if _IS_MAC else "gcc"))
    if compiler is None or (_IS_MAC and not _has_developer_tools()):
        remedy = "run xcode-select --install" if _IS_MAC else "install gcc"
        raise UnavailableError(f"no C compiler here; {remedy}")
    return compiler


@functools.cache
def _has_developer_tools() -> bool:
    """Whether clang of macOS is more than a stand-in, which opens a window to offer them."""
    found = shutil.which("xcode-select")
    return found is not None and not subprocess.run([found, "-p"], capture_output=True).returncode  # noqa: S603


def _compiled() -> Path:
    """The shared library for this machine; compiled if it is not in the cache, whole."""
    compiler, folder = _compiler(), cache_folder()
    name = _fingerprint(compiler)
    verdict = folder / f"{name}.wrong"
    try:
        if kept := kept_code.find(folder, name, ".so"):
            return kept
        if verdict.is_file():
            raise UnavailableError(verdict.read_text())
        return kept_code.keep(folder, name, ".so", functools.partial(_make, compiler, verdict))
    except OSError as error:
        raise UnavailableError(f"cannot write {str(folder)!r}: {error.strerror}") from None


def _make(compiler: str, verdict: Path, target: Path) -> None:
    """Compile and check all branches before the library is kept; a wrong one leaves `verdict`."""
    _compile(compiler, target)
    try:
        _checked(target, briefly=False)
    except UnavailableError as error:
        with contextlib.suppress(DiskError):
            write_text(verdict, str(error))
        raise


def _checked(path: Path, *, briefly: bool) -> Library:
    """Every function compared with its reference, on all its branches unless `briefly`."""
    library = Library(path)
    if fault := self_check.first_fault(library, briefly=briefly):
        raise UnavailableError(f"the compiled kernel for {fault} is wrong here")
    return library


def _compile(compiler: str, target: Path) -> None:
    """The OpenMP runtime is torch's own, already in the process, so that threads are shared."""
    here, runtime = Path(__file__).parent, Path(torch.__file__).parent / "lib"
    openmp = ("-lomp", f"-Wl,-rpath,{runtime}") if _IS_MAC else ()
    command = [
        compiler, *_FLAGS, "-shared", *(str(here / name) for name in SOURCES),
        "-L", str(runtime), *openmp, "-lm", "-o", str(target),
    ]  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
            check=False,
            # what a killed compiler leaves goes with the folder
            env={**os.environ, "TMPDIR": str(target.parent)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{compiler} did not run: {error}") from None
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or ["no message"]
        raise UnavailableError(f"{compiler} failed: {complaint[0]}")


def _fingerprint(compiler: str) -> str:
    """A name that changes with the source, the compiler and the processor."""
    digest = hashlib.sha256()
    for name in SOURCES + HEADERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    status = Path(compiler).resolve().stat()
    digest.update(f"{compiler} {status.st_size} {status.st_mtime_ns} {_FLAGS}".encode())
    digest.update(processor_identity().encode())
    return f"kernels-{digest.hexdigest()[:24]}"
