"""What torch's compilers need, and what they raise when they fail."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmchat.errors import CompileError, DiskError, disk_errors

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NO_COMPILER = "no C++ compiler is here"
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
INSTALL_COMPILER = "install g++ or clang, or set CXX to one"


def keep_compiled_code() -> Path:
    """The folder in which the next start finds what is compiled.

    It is in the user's cache, unless the variable is set. Raises DiskError.
    """
    import platformdirs

    if not os.environ.get(CACHE_VARIABLE):
        folder = platformdirs.user_cache_path("mmchat", appauthor=False) / "inductor"
        os.environ[CACHE_VARIABLE] = str(folder)
    folder = Path(os.environ[CACHE_VARIABLE])
    advice = f"set {CACHE_VARIABLE} to a folder that can be written"
    with disk_errors(f"no cache for compiled code at {str(folder)!r}", advice):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code that is run
    return folder


def check_cpp_compiler() -> None:
    """Raises CompileError if the one that torch will call is not there, before seconds are lost."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        given = f"CXX is {name!r}, which is not there" if os.environ.get("CXX") else NO_COMPILER
        raise CompileError(f"{given}; {INSTALL_COMPILER}")


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what torch.compile and the compilers behind it raise into CompileError or DiskError."""
    try:
        yield
    except Exception as error:
        if fault := _disk_fault(error):
            raise DiskError(
                f"the compiled layers cannot be written: {fault}; free some space, or set"
                f" {CACHE_VARIABLE} and TMPDIR to folders on another disk"
            ) from error
        reason = _reason(error)
        if reason is None:
            raise
        raise CompileError(reason) from error


def _disk_fault(error: Exception) -> str | None:
    """What the system said if the disk is full or faulty, to torch, a compiler or a writer."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_FAULTS:
            return os.strerror(cause.errno)
        if isinstance(cause, RuntimeError):  # of torch's compilers and its writer of archives
            text = str(cause)
            if found := next((s for s in map(os.strerror, _DISK_FAULTS) if s in text), None):
                return found
            if "PytorchStreamWriter failed" in text:
                return "the archive of a layer could not be written"
    return None


def _reason(error: Exception) -> str | None:
    """Why compiling failed, in one line; None if `error` is about something else."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler, TritonMissing

    causes = list(_causes(error))
    if any(isinstance(cause, InvalidCxxCompiler) for cause in causes):
        return f"{NO_COMPILER}; {INSTALL_COMPILER}"
    if any(isinstance(cause, TritonMissing) for cause in causes):
        return "Triton is not installed, or does not know this GPU"
    if any(isinstance(cause, CppCompileError) for cause in causes):
        return "the C++ compiler failed; --debug shows what it said"
    if isinstance(error, FailOnRecompileLimitHit):
        return "more shapes came than torch.compile keeps code for"
    if not isinstance(error, TorchDynamoException):
        return None
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"torch.compile failed ({first_line or type(error).__name__}); --debug shows more"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it was raised from, and what it wraps."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
