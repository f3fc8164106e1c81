"""Recognise that memory ran out, in the words of each allocator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmchat.errors import MemoryError_

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def memory_error(error: BaseException) -> MemoryError_ | None:
    """What a user is told if `error` says that an allocation failed; None for any other error.

    It is a new error, which holds nothing of the call that failed.
    """
    if isinstance(error, MemoryError_):
        return MemoryError_(str(error))
    # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises plain ones
    says_so = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    if not (says_so or isinstance(error, MemoryError)):
        return None
    return MemoryError_(
        "out of memory while running the model; use fewer or smaller pictures, "
        "a shorter context (--max-seq-len), a smaller dtype or another device"
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an allocator's failure into MemoryError_ with the next step."""
    try:
        yield
    except Exception as error:
        out_of_memory = memory_error(error)
        if out_of_memory is None:
            raise
        try:
            raise out_of_memory from None
        finally:
            del out_of_memory  # it would hold this frame, which would hold it
