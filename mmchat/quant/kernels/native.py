"""Compile the C kernels once and keep them."""

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
from mmchat.hardware.cpu import processor_identity
from mmchat.progress import ProgressCallback
from mmchat.quant.kernels import self_check
from mmchat.quant.kernels.library import Library, UnavailableError
from mmchat.storage.atomic_file import write_text

SOURCES = ("linear.c", "attention.c", "quantize.c")
HEADERS = ("bfloat16.h",)
# Not -ffast-math, which may take NaN for impossible: NaN and infinity must be carried through.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_COMPILE_SECONDS = 600  # 5 s on an idle machine


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where they cannot be had; `reason` says why."""
    return _load()[0]


def reason() -> str:
    """One clause: what the kernels use, or why there are none."""
    return _load()[1]


def is_wanted() -> bool:
    """Whether there should be kernels: on Linux, unless the user switches them off."""
    return platform.system() == "Linux" and os.environ.get("MMCHAT_NATIVE_KERNELS", "1") != "0"


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
    if platform.system() != "Linux":
        raise UnavailableError(f"not built on {platform.system()}")
    if not is_wanted():
        raise UnavailableError("switched off by MMCHAT_NATIVE_KERNELS=0")
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    if compiler is None:
        raise UnavailableError("no C compiler here; install gcc")
    return compiler


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
    here = Path(__file__).parent
    command = [
        compiler, *_FLAGS, "-shared", *(str(here / name) for name in SOURCES),
        "-L", str(Path(torch.__file__).parent / "lib"), "-lm", "-o", str(target),
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
