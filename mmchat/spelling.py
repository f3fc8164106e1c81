"""What was probably meant by a name that does not exist, in bounded work."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from difflib import SequenceMatcher

_LETTERS = 64  # of each name
_CANDIDATES = 2_000
_COMPARED = 20  # of the candidates, letter by letter


def closest(name: str, candidates: Iterable[str], *, cutoff: float, count: int = 1) -> list[str]:
    """The candidates most like `name`, whatever their case, best first; cutoff: 0 to 1."""
    matcher = SequenceMatcher(b=name[:_LETTERS].casefold(), autojunk=False)
    likely: list[tuple[float, str]] = []
    for candidate in itertools.islice(candidates, _CANDIDATES):
        matcher.set_seq1(candidate[:_LETTERS].casefold())
        if (ratio := matcher.quick_ratio()) >= cutoff:
            likely.append((ratio, candidate))
    found = []
    for _, candidate in heapq.nlargest(_COMPARED, likely):
        matcher.set_seq1(candidate[:_LETTERS].casefold())
        if (ratio := matcher.ratio()) >= cutoff:
            found.append((ratio, candidate))
    return [candidate for _, candidate in heapq.nlargest(count, found)]
