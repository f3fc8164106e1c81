"""Who waits for a row, and memory: promised to those who write, kept for those who come back."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mmchat import words
from mmchat.engine.drafts import LONGEST_DRAFT
from mmchat.engine.prefix import Need, Place, Prefixes, Slot
from mmchat.errors import MemoryError_
from mmchat.hardware.allocation import memory_error

if TYPE_CHECKING:
    from mmchat.engine.request import Answer, Request
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.base import Cache
    from mmchat.models.prompt import Media

STEP = 256  # positions; no cache makes room in larger steps
CPU_ROWS, DEVICE_ROWS = 8, 64  # answers written at once; beyond the first a CPU gains little
# Pictures that no row needs any more, for a conversation that goes on, where no limit is known
PICTURES_KEPT = 4


def usual_rows(model: LoadedModel, memory: int | None) -> int:
    """How many answers to write at once."""
    return CPU_ROWS if model.device.type == "cpu" else device_rows(model, memory)


def device_rows(model: LoadedModel, memory: int | None) -> int:
    """As many as are usual on a device, while the longest request with a picture still fits.

    All rows of a device grow together, and a step of several copies the picture for each.
    """
    if memory is None:
        return DEVICE_ROWS
    picture = model.media_bytes(model.spec.family.sizes(model.spec.config).largest_picture)
    row = _round_up(model.max_seq_len + LONGEST_DRAFT + 1) * model.position_bytes + picture
    return max(1, min(DEVICE_ROWS, (memory - picture) // row))


class Queue:
    """Answers that wait: those of one owner in the order in which they came, the owners in turns.

    So nobody who sends many requests keeps others from being heard, and nobody is overtaken by
    a smaller request: what does not fit into memory yet is waited for. Any thread may `add` and ask
    how many there are; the rest is for one at a time.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._coming: deque[Answer] = deque()  # not among the others yet
        self._by_owner: dict[str, deque[Answer]] = {}  # who is next comes first

    def __iter__(self) -> Iterator[Answer]:
        self._queue_up()
        return (answer for answers in self._by_owner.values() for answer in answers)

    def __len__(self) -> int:
        return len(self._coming) + sum(map(len, list(self._by_owner.values())))

    def __bool__(self) -> bool:
        return bool(self._by_owner or self._coming)

    def add(self, answer: Answer) -> None:
        self._coming.append(answer)

    def _queue_up(self) -> None:
        while self._coming:
            answer = self._coming.popleft()
            self._by_owner.setdefault(answer.request.owner, deque()).append(answer)

    def next(self, running: Counter[str]) -> Answer | None:
        """Who gets the next free row. running: rows of each owner; one at least is free.

        Nobody gets the last free row beside another of their own, so that somebody new is heard at
        once, nor more than half of the rows while others wait. The owner "" may take all rows:
        where owners are not told apart there is only this one.
        """
        self._queue_up()
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


class Room:
    """Keeps a cache within `limit` bytes, None for any number.

    A request is promised all that it may come to need when it is given its slot: memory that runs
    out in the middle would cost somebody an answer. What idle slots and pictures hold counts too,
    and goes first, the least recently used before others. Without a limit PICTURES_KEPT stay.
    """

    def __init__(
        self, cache: Cache, prefixes: Prefixes, model: LoadedModel, limit: int | None
    ) -> None:
        self.limit = limit
        self._cache, self._prefixes, self._model = cache, prefixes, model
        # bytes by content hash, of those that are encoded; the one used last comes last
        self._pictures: dict[str, int] = {}
        self._longest = 0  # positions that all slots of a fixed cache have room for

    @property
    def used(self) -> int:
        """Bytes that are promised or kept now, where there is a limit; from any thread."""
        needs = [slot.need for slot in self._prefixes.slots]
        return self._bytes([Need(self._longest), *needs], dict(self._pictures))

    def check(self, request: Request) -> None:
        """Raises MemoryError_ if it would not fit even alone."""
        if self.limit is None:
            return

        def bytes_with(pictures: int) -> int:
            """With the first so many of its pictures."""
            need = self._need(request, pictures)
            return self._bytes([need], need.pictures)

        limit, count = self.limit, len(request.prompt.media)
        if (most := bytes_with(count)) > limit:
            fewer = words.first_pictures(lambda fewer: bytes_with(fewer) <= limit, count)
            raise MemoryError_(
                f"the prompt of {len(request.prompt.token_ids):,} tokens and an answer of up to "
                f"{request.sampling.max_new_tokens:,} need {words.size(most)}, and there is room "
                f"for {words.size(limit)}; ask for a shorter answer (--max-new-tokens), "
                f"{'with fewer rows at once, ' if self._cache.fixed else ''}or "
                f"with fewer pictures{fewer}"
            )

    def place(self, request: Request) -> Place | None:
        """A free slot for the request; None if it must wait until others are done."""
        if self.limit is None:
            return self._prefixes.find(request)
        need = self._need(request)
        needs = [need, *(slot.need for slot in self._prefixes.slots if slot.is_taken)]
        needed = {name: size for one in needs for name, size in one.pictures.items()}
        # a fixed cache gives back what its longest row took when nobody writes
        longest = Need(self._longest if len(needs) > 1 else 0)
        if self._bytes([longest, *needs], needed) > self.limit:
            return None
        while True:
            place = self._prefixes.find(request)
            if self._holds(place.slot, need, needed) <= self.limit:
                return place
            others = [slot for slot in self._idle() if slot is not place.source]
            if place.shared and not place.source.is_taken and not others:
                # rather cut the source than lose it
                place = replace(place, slot=place.source)
                if self._holds(place.slot, need, needed) <= self.limit:
                    return place
            if not self._free_one(place, needed):
                return place

    def take(self, place: Place, request: Request) -> None:
        """Give the request its slot, and promise it its memory; the cache begins its prompt there.

        What was promised is allocated once: growing holds the old and the new at the same time.
        """
        slot, prompt = place.slot, request.prompt
        self._prefixes.take(slot, request.owner)
        if self.limit is not None:
            slot.need = self._need(request)
            if self._cache.fixed:
                self._longest = max(self._longest, slot.need.positions)
        for placed in prompt.media:
            if (content_hash := placed.media.content_hash) in self._pictures:
                self._pictures[content_hash] = self._pictures.pop(content_hash)
        if place.source is slot:
            self._cache.truncate(slot.number, place.shared)
        else:
            self._cache.truncate(slot.number, 0)
            self._cache.copy(place.source.number, slot.number, place.shared)
        # not before it holds them: copying may run out of memory
        slot.marks = list(prompt.fingerprint[: place.shared])
        if self.limit is not None:
            self._cache.shrink(slot.number)
            self._cache.reserve(slot.number, slot.need.positions)
        self._cache.begin(slot.number, prompt)
        if self.limit is None:
            for content_hash in [*self._encoded()][:-PICTURES_KEPT]:
                self._cache.drop_media(content_hash)  # unless a row needs it

    def encoded(self, media: Media) -> None:
        """The cache has this picture now."""
        size = 0 if self.limit is None else self._model.media_bytes(media.facts)
        self._pictures[media.content_hash] = size

    def leave(self, slot: Slot, marks: Sequence[int | str]) -> None:
        """The row is over; its slot keeps the positions of `marks` for those who share them."""
        slot.marks, slot.is_taken = list(marks), False
        slot.need = replace(slot.need, pictures={})
        self._cache.truncate(slot.number, len(marks))
        if not marks:
            self.free(slot)
        elif self.limit is not None:
            try:
                self._cache.shrink(slot.number)
            except Exception as error:  # the smaller one is made beside the larger
                if memory_error(error) is None:
                    raise
                self.free(slot)
            else:
                slot.need = replace(slot.need, positions=_round_up(len(marks)))

    def free(self, slot: Slot) -> None:
        """Forget what an idle slot holds, for good."""
        slot.marks, slot.need = [], Need()
        self._cache.free(slot.number)

    def release(self) -> None:
        """Give back what no running row needs, but for the only conversation of a single slot."""
        slots = self._prefixes.slots
        for slot in slots if len(slots) > 1 else ():
            if not slot.is_taken:
                self.free(slot)
        self._cache.release()

    def _free_one(self, place: Place, needed: Mapping[str, int]) -> bool:
        """Forget a picture that nothing refers to, or else an idle slot; False if there is none."""
        for content_hash in [name for name in self._encoded() if name not in needed]:
            self._cache.drop_media(content_hash)
            if not self._cache.has_media(content_hash):
                return True
        idle = self._idle()
        if not idle:
            is_over = self._longest > 0 and not any(s.is_taken for s in self._prefixes.slots)
            if is_over:
                self._cache.release()
                self._longest = 0
            return is_over
        # what the request would overwrite, then the others, and last what it shares

        def worth(slot: Slot) -> tuple[bool, bool, int]:
            return place.shared > 0 and slot is place.source, slot is not place.slot, slot.used

        self.free(min(idle, key=worth))
        return True

    def _idle(self) -> list[Slot]:
        return [s for s in self._prefixes.slots if s.need.positions and not s.is_taken]

    def _holds(self, given: Slot, need: Need, needed: Mapping[str, int]) -> int:
        """Bytes of everything, once a slot is given to who needs that."""
        kept = [slot.need for slot in self._prefixes.slots if slot is not given]
        return self._bytes([need, Need(self._longest), *kept], {**self._encoded(), **needed})

    def _encoded(self) -> dict[str, int]:
        """The pictures that the cache still has."""
        held = self._pictures
        self._pictures = {name: held[name] for name in held if self._cache.has_media(name)}
        return self._pictures

    def _bytes(self, needs: Sequence[Need], pictures: Mapping[str, int]) -> int:
        """Of these rows, and of pictures, which rows share."""
        positions, beside = sum(need.positions for need in needs), 0
        if self._cache.fixed:
            slots = len(self._prefixes.slots)
            positions = max(need.positions for need in needs) * slots
            # a step of several slots reads copies of what they see, each as long as the longest
            beside = slots * max(need.together for need in needs) if slots > 1 else 0
        return positions * self._model.position_bytes + sum(pictures.values()) + beside

    def _need(self, request: Request, count: int | None = None) -> Need:
        """What it may come to need; count: with the first so many of its pictures."""
        media = request.prompt.media
        placed, left_out = media[:count], media[len(media[:count]) :]
        positions = len(request.prompt.token_ids) + request.sampling.max_new_tokens
        positions -= sum(one.count for one in left_out)
        if self._cache.fixed:  # one row's draft is written in all, also behind those that are full
            positions += LONGEST_DRAFT + 1
        pictures: dict[str, int] = {}  # what occurs twice is kept once
        most = run = behind = 0  # of those that lie side by side, and so are seen by one position
        for one in placed:
            size = pictures[one.media.content_hash] = self._model.media_bytes(one.media.facts)
            run = run + size if one.position == behind else size
            most, behind = max(most, run), one.position + 1
        return Need(_round_up(positions), pictures, most)


def _round_up(positions: int) -> int:
    return -(-positions // STEP) * STEP
