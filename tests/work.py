"""Counts work instead of time: the same on every machine, however busy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized
from types import FrameType
from typing import Any


def work(call: Callable[[], object]) -> int:
    """Lines of Python that `call` runs, and the length of each text or list that these make.

    Seen are names of functions and attributes of `self`. What C code does within a line is not, nor
    what other packages do with what they are given.
    """
    total = 0
    known: dict[tuple[int, str], object] = {}

    def count(names: dict[str, Any], owner: int) -> int:
        made = 0
        for name, value in names.items():
            is_long = isinstance(value, str | bytes | list | tuple) and len(value) > 64
            if is_long and known.get((owner, name)) is not value:
                known[owner, name] = value
                made += len(value)
        return made

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal total
        total += 1 + count(frame.f_locals, id(frame))
        own = getattr(frame.f_locals.get("self"), "__dict__", None)
        if own:
            total += count(own, id(own))
        return None if "site-packages" in frame.f_code.co_filename else trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return total


def uncounted(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, of whose work only what it is given counts: that of other packages takes long."""

    def quiet(*arguments: Any) -> Any:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return call(*arguments)
        finally:
            sys.settrace(trace)

    return quiet


def growth(run: Callable[[Any], object], make: Callable[[int], Sized], size: int = 500) -> float:
    """How many times the work grows when the input grows fourfold: 4 if it is linear."""
    run(make(16))  # what is imported or compiled once
    first, last = (work(lambda n=n: run(make(n))) for n in (size, 4 * size))
    return last / first
