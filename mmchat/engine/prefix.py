"""What the slots of a cache hold, and which of them a new prompt begins in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmchat.engine.request import Request
from mmchat.models.base import common_prefix

# A shorter one saves less than it costs to read on in the middle of a text, or to copy.
SHORTEST_SHARED = 16  # positions


@dataclass(frozen=True)
class Need:
    """What a row is promised where memory is limited, and what an idle slot holds on to.

    positions: in steps in which caches grow. pictures: that the row needs, bytes by content hash.
    together: bytes of the most of them that one position sees.
    """

    positions: int = 0
    pictures: Mapping[str, int] = field(default_factory=dict)
    together: int = 0


@dataclass
class Slot:
    """marks: the fingerprint of the positions that it holds. used: when it was given last."""

    number: int
    marks: list[int | str] = field(default_factory=list)
    owner: str = ""
    is_taken: bool = False
    used: int = 0
    need: Need = Need()


@dataclass(frozen=True)
class Place:
    """Where a prompt is read: into `slot`, which holds `shared` positions once these are copied
    from `source`, if that is another."""

    slot: Slot
    source: Slot
    shared: int


class Prefixes:
    """All slots of one cache."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot(number) for number in range(count)]
        self._clock = 0

    @property
    def has_room(self) -> bool:
        return any(not slot.is_taken for slot in self.slots)

    def find(self, request: Request) -> Place:
        """A free slot for its prompt, with the longest beginning that any slot of the owner holds.

        A position whose logits are needed is read again even if it is held.
        """
        free = [slot for slot in self.slots if not slot.is_taken]
        source, shared = self._best(request, free)
        is_kept = shared < len(source.marks) and any(not slot.marks for slot in free)
        if shared and (source.is_taken or is_kept):
            others = [slot for slot in free if slot is not source]
            return Place(min(others, key=_age), source, shared)
        return Place(source, source, shared)

    def take(self, slot: Slot, owner: str) -> None:
        """Give a free slot to a request of this owner."""
        self._clock += 1
        slot.marks, slot.owner = [], owner
        slot.is_taken, slot.used = True, self._clock

    def _best(self, request: Request, free: list[Slot]) -> tuple[Slot, int]:
        """Where nothing that is worth it is shared, the slot to read the prompt in, and 0."""
        marks, most = request.prompt.fingerprint, request.shareable
        oldest = min(free, key=_age)
        best, shared = oldest, 0
        for slot in self.slots:
            if slot.owner == request.owner:
                found = min(common_prefix(slot.marks, marks), most)
                if found > shared:
                    best, shared = slot, found
        is_long = shared >= min(SHORTEST_SHARED, len(marks) // 8)
        return (best, shared) if is_long else (oldest, 0)


def _age(slot: Slot) -> tuple[bool, int]:
    """Empty slots first, then the one that was given longest ago."""
    return bool(slot.marks), slot.used
