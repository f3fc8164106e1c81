"""What was probably meant by a name that does not exist, in bounded work."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_LETTERS = 64  # of each name
_CANDIDATES = 2_000
_COMPARED = 20  # of the candidates, letter by letter


def closest(name: str, candidates: Iterable[str], *, cutoff: float, count: int = 1) -> list[str]:
    """The candidates most like `name`, whatever their case, best first; cutoff: 0 to 1."""
    folded = {one[:_LETTERS].casefold(): one for one in itertools.islice(candidates, _CANDIDATES)}
    wanted = name[:_LETTERS].casefold()
    matcher = SequenceMatcher(b=wanted, autojunk=False)

    def likeness(candidate: str) -> float:
        matcher.set_seq1(candidate)
        return matcher.quick_ratio()

    likely = heapq.nlargest(_COMPARED, folded, key=likeness)
    return [folded[one] for one in get_close_matches(wanted, likely, count, cutoff)]
