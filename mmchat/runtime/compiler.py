"""What torch's compilers need, and what they raise when they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmchat.errors import CompileError

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code() -> Path:
    """The folder in which the next start finds what is compiled.

    It is in the user's cache, unless the variable is set. Raises CompileError.
    """
    import platformdirs

    if not os.environ.get(CACHE_VARIABLE):
        folder = platformdirs.user_cache_path("mmchat", appauthor=False) / "inductor"
        os.environ[CACHE_VARIABLE] = str(folder)
    folder = Path(os.environ[CACHE_VARIABLE])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code that is run
    except OSError as error:
        raise CompileError(
            f"no cache for compiled code at {str(folder)!r} ({error.strerror}); "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from None
    return folder


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what torch.compile and the compilers behind it raise into CompileError."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise CompileError(reason) from error


def _reason(error: Exception) -> str | None:
    """Why compiling failed, in one line; None if `error` is about something else."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler, TritonMissing

    causes = list(_causes(error))
    if any(isinstance(cause, InvalidCxxCompiler) for cause in causes):
        return "no C++ compiler is here; install g++ or clang, or set CXX to one"
    if any(isinstance(cause, TritonMissing) for cause in causes):
        return "Triton is not installed, or does not know this GPU"
    if any(isinstance(cause, CppCompileError) for cause in causes):
        return "the C++ compiler failed; --debug shows what it said"
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
