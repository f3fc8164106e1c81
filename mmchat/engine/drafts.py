"""Prompt lookup: guess the next tokens from what followed the last ones earlier in the text.

A guess (draft) is read in one step with the token before it, and each of its tokens is then sampled
as always; the first that differs from the draft ends the run. What is sampled does not depend on
the draft, so the answer is the same, token for token and seed for seed, up to the rounding of a
step with several rows. This is speculative sampling (Leviathan et al. 2023) for a draft that is
certain of itself: a drafted token is accepted with the model's probability of it, and otherwise
replaced by one drawn from the rest. Source of the lookup: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

Speculate = int | Literal["auto", "off"]

LONGEST_DRAFT = 64
# Few, because each is timed by itself, and on a GPU captured as a graph of its own.
_DRAFT_LENGTHS = (1, 3, 7, 15)
_FORCED = 9  # stands for the length of a match where no other text can follow
_LONGEST_MATCH = 8  # this and the places bound the work of a token, however a text repeats itself
# Replaced tokens, one after the other, that end a copy. In a simulation with measured steps copied
# text becomes 1.73 times as fast in int4; ending it at the first one leaves 1.47.
_REPLACED = 2
_PLACES = 16  # earlier places of the last two tokens that are compared, newest first
_STEPS_BEFORE_FIRST_DRAFT = 3  # the cost of a draft is told in plain steps, so these come first
_SHARE_TO_LOSE = 0.02
_FIRST_CREDIT = 0.3  # steps; less than one, so that a short answer loses little
_MOST_CREDIT = 4.0  # steps
_WARM_UP = 20.0  # steps


class PromptLookup:
    """The text so far, indexed by pairs of tokens.

    What was found last is followed while the text goes on, so that a token which replaces another
    does not end the copy: a text that is given back with changes is mostly such.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._followed: int | None = None  # where the text goes on if it still copies
        self._replaced = 0
        self._after: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for token_id in ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        if len(self._ids) >= 2:
            self._after[self._ids[-2], self._ids[-1]].append(len(self._ids))
        if self._followed is not None:
            same = self._ids[self._followed] == token_id
            self._replaced = 0 if same else self._replaced + 1
            self._followed = self._followed + 1 if self._replaced < _REPLACED else None
        self._ids.append(token_id)

    def find(self) -> tuple[int, int]:
        """Where the text goes on after the longest earlier match of its end; length of the match.

        At least two tokens match, and the newest of equals is taken. Without such a place, where
        the last copy goes on, as a match of 1; (0, 0) if that has ended.
        """
        best = (0, 0)
        for place in reversed(self._after.get(tuple(self._ids[-2:]), [])[-_PLACES:]):  # type: ignore[arg-type]
            length = self._match(place)
            if length > best[1]:
                best = (place, length)
            if length >= _LONGEST_MATCH:
                break
        if best[1]:
            self._followed, self._replaced = best[0], 0
        elif self._followed is not None:
            return self._followed, 1
        return best

    def _match(self, place: int) -> int:
        """How many tokens before `place` are those at the end of the text."""
        ids, most = self._ids, min(_LONGEST_MATCH, place)
        return next((n for n in range(2, most) if ids[place - n - 1] != ids[-n - 1]), most)

    def copy(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; a copy that reaches the end goes on with itself."""
        draft: list[int] = []
        while len(draft) < count:
            index = place + len(draft)
            known = index < len(self._ids)
            draft.append(self._ids[index] if known else draft[index - len(self._ids)])
        return draft


class Pace:
    """Chooses how long drafts are, from what steps cost and how many drafted tokens were right.

    It never bets more than it has won, 0.3 steps, and two percent of the plain steps: where drafts
    do not pay they stop. Kept for a whole conversation.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=7))
        self._steps = 0
        self._tried = {0}  # numbers of drafted tokens
        self._credit = _FIRST_CREDIT
        # by length of the match: tokens accepted of those compared, older ones counting less
        self._accepted: defaultdict[int, tuple[float, float]] = defaultdict(lambda: (1.0, 2.0))
        self._accepted[_FORCED] = 9.0, 10.0  # the text is certain, its tokens are not

    def stepped(self, seconds: float) -> None:
        """A step without a draft took so long."""
        self._steps += 1
        self._seconds[1].append(seconds)
        self._credit = min(self._credit + _SHARE_TO_LOSE, _MOST_CREDIT)

    def verified(self, drafted: int, accepted: int, match: int, seconds: float) -> None:
        """A step with `drafted` tokens took so long, and this many of them were right."""
        self.compared(match, accepted, min(accepted + 1, drafted))
        steps = seconds / _median(self._seconds[1]) if self._seconds[1] else 1.0
        if drafted not in self._tried and steps > _WARM_UP:
            steps = 1.0  # something was compiled or captured for this number of rows
        else:
            self._seconds[drafted + 1].append(seconds)
        self._tried.add(drafted)
        self._credit = min(self._credit + accepted + 1 - steps, _MOST_CREDIT)

    def compared(self, match: int, right: int, count: int) -> None:
        """Of `count` tokens that the text suggested after such a match, so many were right."""
        before = self._accepted[match]
        self._accepted[match] = (0.9 * before[0] + right, 0.9 * before[1] + count)

    def draft_length(self, match: int) -> int:
        """How many tokens to draft after a match of this length; 0 is none."""
        if self._steps < _STEPS_BEFORE_FIRST_DRAFT:
            return 0
        right, compared = self._accepted[match]
        share = min(right / compared, 0.98)  # below 1, as `expected` divides by 1 - share
        tried = max(self._tried) + 1  # rows; beyond twice as many the cost is a guess
        best, speed = 0, 1.0  # tokens in the time of a step
        for length in _DRAFT_LENGTHS:
            cost = self._cost(length + 1)
            expected = (1 - share ** (length + 1)) / (1 - share)
            affordable = cost - 1 <= self._credit and length + 1 <= 2 * tried
            if affordable and expected / cost > speed:
                best, speed = length, expected / cost
        return best

    def _cost(self, rows: int) -> float:
        """Expected time of a step with so many rows, in plain steps."""
        known = max((n for n in self._seconds if 1 < n <= rows), default=None)
        if known is None:
            return 1 + 0.25 * (rows - 1)  # until one is measured
        measured = _median(self._seconds[known]) / _median(self._seconds[1])
        return max(1 + (measured - 1) * (rows - 1) / (known - 1), 1.0)


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


class Drafter:
    """Drafts for one answer. `ids`: the prompt.

    speculate: "auto" lets `pace` choose the length, a number is the length, "off" or 0 drafts
    nothing. stop_ids end a draft; ids from vocab_size on (image tokens) cannot be in one.
    """

    def __init__(
        self,
        ids: Iterable[int],
        speculate: Speculate,
        pace: Pace,
        *,
        stop_ids: Collection[int],
        vocab_size: int,
    ) -> None:
        self._length = 0 if speculate == "off" else speculate
        self._lookup = PromptLookup(ids if self._length else ())
        self._pace = pace
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._match = 0
        self._suggested: int | None = None

    def append(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if self._suggested is not None:
            self._pace.compared(self._match, int(token_id == self._suggested), 1)
            self._suggested = None
        if self._length:
            self._lookup.append(token_id)

    def draft(self, most: int, forced: Sequence[int] = ()) -> list[int]:
        """The next tokens, at most `most`; none where a plain step is expected to be as good.

        forced: tokens of the only text that can follow; drafted instead of a guess.
        """
        if not self._length or most < 1:
            return []
        place, self._match = (0, _FORCED) if forced else self._lookup.find()
        if not self._match:
            return []
        auto = self._length == "auto"
        length = self._pace.draft_length(self._match) if auto else int(self._length)
        length = min(length, most)
        self._suggested = forced[0] if forced else self._lookup.copy(place, 1)[0]
        draft = list(forced[:length]) if forced else self._lookup.copy(place, length)
        for count, token_id in enumerate(draft):
            if token_id >= self._vocab_size:
                return draft[:count]
            if token_id in self._stop_ids:
                return draft[: count + 1]
        return draft

    def shortened(self, draft: list[int]) -> list[int]:
        """What was left of a draft, with a length that drafts have where these are chosen here."""
        if self._length != "auto":
            return draft
        return draft[: max((n for n in _DRAFT_LENGTHS if n <= len(draft)), default=0)]

    def stepped(self, seconds: float) -> None:
        """A step without a draft took so long."""
        self._pace.stepped(seconds)

    def verified(self, drafted: int, accepted: int, seconds: float) -> None:
        """The last draft was read in one step; so many of its tokens were right."""
        self._suggested = None
        self._pace.verified(drafted, accepted, self._match, seconds)
