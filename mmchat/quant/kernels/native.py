"""The C kernels: those of the wheel, or else compiled once and kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from mmchat.errors import DiskError
from mmchat.hardware import kept_code
from mmchat.hardware.cpu import is_arm, processor_flags, processor_identity
from mmchat.progress import ProgressCallback
from mmchat.quant.kernels import self_check
from mmchat.quant.kernels.compiler import (
    FLAGS,
    HEADERS,
    IS_MAC,
    SOURCES,
    VARIANTS,
    arm_flags,
    compile_kernels,
)
from mmchat.quant.kernels.library import Library, UnavailableError
from mmchat.storage.atomic_file import write_text

_MACHINE = arm_flags(processor_flags()) if is_arm() else ("-march=native",)
_FLAGS = (*FLAGS, *_MACHINE)
SHIPPED = Path(__file__).parent / "built"  # only in wheels (hatch_build.py)


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


def is_possible() -> bool:
    """Whether kernels are here, or what compiles them."""
    with contextlib.suppress(UnavailableError):
        return _shipped() is not None or bool(_compiler())
    return False


def _is_built_here() -> bool:
    return platform.system() == "Linux" or (IS_MAC and is_arm())


def prepare(progress: ProgressCallback | None = None) -> None:
    """Compile the kernels now if that is still to be done, so that `progress` can tell of it."""
    try:
        if _shipped() or kept_code.find(cache_folder(), _fingerprint(_compiler()), ".so"):
            return
    except UnavailableError:
        return
    if progress:
        progress("kernels", 0, 1)
    if library() and progress:
        progress("kernels", 1, 1)


@functools.cache
def _load() -> tuple[Library | None, str]:
    if shipped := _shipped():
        return shipped, f"as installed, {shipped.instructions}"
    try:
        found = _checked(_compiled(), briefly=True)
    except UnavailableError as error:
        return None, str(error)
    return found, f"compiled for this machine, {found.instructions}"


@functools.cache
def _shipped() -> Library | None:
    """The best library of the wheel for this processor, if the wheel has one and it is right."""
    for variant in VARIANTS.get(platform.machine(), ()) if is_wanted() else ():
        path = SHIPPED / f"{variant.name}.so"
        if variant.needs <= processor_flags() and path.is_file():
            with contextlib.suppress(UnavailableError):
                return _checked(path, briefly=True)
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    import platformdirs

    return platformdirs.user_cache_path("mmchat", appauthor=False) / "kernels"


def _compiler() -> str:
    if not _is_built_here():
        raise UnavailableError(f"not built on {platform.system()}")
    if not is_wanted():
        raise UnavailableError("switched off by MMCHAT_NATIVE_KERNELS=0")
    compiler = shutil.which(os.environ.get("CC") or ("clang" if IS_MAC else "gcc"))
    if compiler is None or (IS_MAC and not _has_developer_tools()):
        remedy = "run xcode-select --install" if IS_MAC else "install gcc"
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
    runtime = Path(torch.__file__).parent / "lib"
    openmp = ("-L", str(runtime), "-lomp", f"-Wl,-rpath,{runtime}") if IS_MAC else ()
    try:
        compile_kernels(compiler, _FLAGS, Path(__file__).parent, target, openmp)
    except subprocess.CalledProcessError as error:
        complaint = error.stderr.strip().splitlines() or ["no message"]
        raise UnavailableError(f"{compiler} failed: {complaint[0]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{compiler} did not run: {error}") from None


def _fingerprint(compiler: str) -> str:
    """A name that changes with the source, the compiler and the processor."""
    digest = hashlib.sha256()
    for name in SOURCES + HEADERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    status = Path(compiler).resolve().stat()
    digest.update(f"{compiler} {status.st_size} {status.st_mtime_ns} {_FLAGS}".encode())
    digest.update(processor_identity().encode())
    return f"kernels-{digest.hexdigest()[:24]}"
