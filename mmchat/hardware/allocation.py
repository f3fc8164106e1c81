"""Recognise that memory ran out, in the words of each allocator."""

from __future__ import annotations

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


class memory_errors:  # noqa: N801 - used like a function
    """Turn an allocator's failure into MemoryError_ with the next step."""

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        failure = memory_error(error) if isinstance(error, Exception) else None
        # this frame is held by what it raises, and would hold all that the failed call had
        del error, traceback
        try:
            if failure is not None:
                raise failure from None
        finally:
            del failure
