"""Who waits for a row, and who is next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from mmchat.engine.request import Answer


class Queue:
    """Answers that wait: those of one owner in the order in which they came, the owners in turns.

    So nobody who sends many requests keeps others from being heard, and nobody is overtaken by
    a smaller request: what does not fit into memory yet is waited for.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._by_owner: dict[str, deque[Answer]] = {}  # who is next comes first

    def __iter__(self) -> Iterator[Answer]:
        return (answer for answers in self._by_owner.values() for answer in answers)

    def __len__(self) -> int:
        return sum(map(len, list(self._by_owner.values())))

    def __bool__(self) -> bool:
        return bool(self._by_owner)

    def add(self, answer: Answer) -> None:
        self._by_owner.setdefault(answer.request.owner, deque()).append(answer)

    def next(self, running: Counter[str]) -> Answer | None:
        """Who gets the next free row. running: rows of each owner; one at least is free.

        Nobody gets the last free row beside another of their own, so that somebody new is heard at
        once, nor more than half of the rows while others wait. The owner "" may take all rows:
        where owners are not told apart there is only this one.
        """
        free = self._rows - running.total()
        for owner, answers in self._by_owner.items():
            rows = running[owner]
            has_share = len(self._by_owner) > 1 and 2 * rows >= self._rows
            is_last = free == 1 and self._rows > 2
            if not (rows and owner and (has_share or is_last)):
                return answers[0]
        return None

    def remove(self, answer: Answer) -> None:
        """It is given a row, or cancelled; its owner's turn is over."""
        owner = answer.request.owner
        answers = self._by_owner.pop(owner)
        answers.remove(answer)
        if answers:
            self._by_owner[owner] = answers
