"""What Ollama does with a conversation that is too long: its oldest messages are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mmchat.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from mmchat.server.ask import Ask, AskedMessage

T = TypeVar("T")


def that_fits(ask: Ask, make: Callable[[Ask], T]) -> T:
    """`make` of all of it, or, if it may be cut, without as few of its oldest messages as need be.

    System messages and the last one stay. Raises ContextLengthExceeded if that is too long.
    """
    try:
        return make(ask)
    except ContextLengthExceeded:
        if not ask.drops_oldest or not isinstance(ask.prompt, tuple):
            raise
    *before, _ = ask.prompt
    old = [one for one in before if not isinstance(one, int) and one.role != "system"]
    found: T | None = None
    low, high = 1, len(old)
    while low <= high:
        middle = (low + high) // 2
        try:
            found, high = make(_without(ask, old[:middle])), middle - 1
        except ContextLengthExceeded:
            low = middle + 1
    return make(_without(ask, old)) if found is None else found  # the first raises


def _without(ask: Ask, gone: list[AskedMessage]) -> Ask:
    """Each message has its own `param`, so that equal ones differ."""
    kept = [one for one in ask.prompt if one not in gone] if isinstance(ask.prompt, tuple) else []
    return replace(ask, prompt=tuple(kept))
