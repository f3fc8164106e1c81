"""Memory of rows and pictures: what is promised to those who write, and kept for who comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mmchat import words
from mmchat.engine.drafts import LONGEST_DRAFT
from mmchat.engine.prefix import Place, Prefixes, Slot
from mmchat.errors import MemoryError_
from mmchat.hardware.allocation import memory_error

if TYPE_CHECKING:
    from mmchat.engine.request import Request
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.base import Cache
    from mmchat.models.prompt import Media, PlacedMedia, Prompt

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
        slots = self._prefixes.slots
        rooms, together = [slot.room for slot in slots], [slot.together for slot in slots]
        return self._bytes([self._longest, *rooms], dict(self._pictures), together)

    def check(self, request: Request) -> None:
        """Raises MemoryError_ if it would not fit even alone."""
        if self.limit is None:
            return
        limit, media, positions = self.limit, request.prompt.media, self._positions(request)

        def need_of(count: int) -> int:
            """With the first so many of its pictures."""
            left, taken = positions - sum(p.count for p in media[count:]), media[:count]
            return self._bytes([_round_up(left)], self._bytes_of(taken), [self._together(taken)])

        need = need_of(len(media))
        if need > limit:
            fewer = words.first_pictures(lambda count: need_of(count) <= limit, len(media))

            raise MemoryError_(
                f"the prompt of {len(request.prompt.token_ids):,} tokens and an answer of up to "
                f"{request.sampling.max_new_tokens:,} need {words.size(need)}, and there is room "
                f"for {words.size(limit)}; ask for a shorter answer (--max-new-tokens), "
                f"{'with fewer rows at once, ' if self._cache.fixed else ''}or "
                f"with fewer pictures{fewer}"
            )

    def place(self, request: Request) -> Place | None:
        """A free slot for the request; None if it must wait until others are done."""
        if self.limit is None:
            return self._prefixes.find(request)
        needed = self._pictures_of(request)
        taken = [slot for slot in self._prefixes.slots if slot.is_taken]
        for slot in taken:
            needed |= slot.pictures
        own = self._positions(request)
        rooms = [own, *(slot.room for slot in taken)]
        if taken and self._cache.fixed:
            rooms.append(self._longest)  # given back when nobody writes
        together = [self._together(request.prompt.media), *(slot.together for slot in taken)]
        if self._bytes(rooms, needed, together) > self.limit:
            return None
        while True:
            place = self._prefixes.find(request)
            if self._holds(place.slot, request, needed) <= self.limit:
                return place
            if place.shared and not place.source.is_taken and not self._others(place):
                # rather cut the source than lose it
                place = replace(place, slot=place.source)
                if self._holds(place.slot, request, needed) <= self.limit:
                    return place
            if not self._free_one(place, needed):
                return place

    def take(self, place: Place, request: Request) -> None:
        """Promise the request its memory."""
        self._prefixes.take(place, request)
        if self.limit is not None:
            place.slot.room = self._positions(request)
            if self._cache.fixed:
                self._longest = max(self._longest, place.slot.room)
            place.slot.pictures = self._pictures_of(request)
            place.slot.together = self._together(request.prompt.media)
        for placed in request.prompt.media:
            if (content_hash := placed.media.content_hash) in self._pictures:
                self._pictures[content_hash] = self._pictures.pop(content_hash)

    def begin(self, slot: Slot, prompt: Prompt) -> None:
        """The slot, which holds what it shares with it, is to read a prompt.

        What was promised is allocated once: growing holds the old and the new at the same time.
        """
        if self.limit is not None:
            self._cache.shrink(slot.number)
            self._cache.reserve(slot.number, slot.room)
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
        slot.marks, slot.is_taken, slot.pictures = list(marks), False, {}
        self._cache.truncate(slot.number, len(marks))
        if not marks:
            self.free(slot)
        elif self.limit is not None:
            self._shrink(slot, len(marks))

    def _shrink(self, slot: Slot, positions: int) -> None:
        try:
            self._cache.shrink(slot.number)
        except Exception as error:  # the smaller one is made beside the larger
            if memory_error(error) is None:
                raise
            self.free(slot)
        else:
            slot.room = _round_up(positions)

    def free(self, slot: Slot) -> None:
        """Forget what an idle slot holds, for good."""
        slot.marks, slot.room, slot.together = [], 0, 0
        self._cache.free(slot.number)

    def release(self) -> None:
        """Give back what no running row needs, but for the only conversation of a single slot."""
        slots = self._prefixes.slots
        for slot in slots if len(slots) > 1 else ():
            if not slot.is_taken:
                self.free(slot)
        self._cache.release()

    def _free_one(self, place: Place, needed: dict[str, int]) -> bool:
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
        return [slot for slot in self._prefixes.slots if slot.room and not slot.is_taken]

    def _others(self, place: Place) -> list[Slot]:
        return [slot for slot in self._idle() if slot is not place.source]

    def _holds(self, given: Slot, request: Request, needed: dict[str, int]) -> int:
        """Bytes of everything, once a slot is given to the request."""
        kept = [slot for slot in self._prefixes.slots if slot is not given]
        rooms = [self._positions(request), self._longest, *(slot.room for slot in kept)]
        together = [self._together(request.prompt.media), *(slot.together for slot in kept)]
        return self._bytes(rooms, self._encoded() | needed, together)

    def _encoded(self) -> dict[str, int]:
        """The pictures that the cache still has."""
        held = self._pictures
        self._pictures = {name: held[name] for name in held if self._cache.has_media(name)}
        return self._pictures

    def _bytes(
        self, rooms: Sequence[int], pictures: dict[str, int], together: Sequence[int]
    ) -> int:
        positions, beside = sum(rooms), 0
        if self._cache.fixed:
            slots = len(self._prefixes.slots)
            positions = max(rooms) * slots
            # a step of several slots reads copies of what they see, each as long as the longest
            beside = slots * max(together, default=0) if slots > 1 else 0
        return positions * self._model.position_bytes + sum(pictures.values()) + beside

    def _positions(self, request: Request) -> int:
        most = len(request.prompt.token_ids) + request.sampling.max_new_tokens
        # one row's draft is written in all slots, also behind those that are full
        return _round_up(most + (LONGEST_DRAFT + 1 if self._cache.fixed else 0))

    def _pictures_of(self, request: Request) -> dict[str, int]:
        return self._bytes_of(request.prompt.media)

    def _together(self, placed: Sequence[PlacedMedia]) -> int:
        """Bytes of the most pictures that lie side by side, and so are seen by one position."""
        most = run = behind = 0
        for one in placed:
            size = self._model.media_bytes(one.media.facts)
            run = run + size if one.position == behind else size
            most, behind = max(most, run), one.position + 1
        return most

    def _bytes_of(self, placed: Sequence[PlacedMedia]) -> dict[str, int]:
        """By content hash: what occurs twice is kept once."""
        media = [one.media for one in placed]
        return {one.content_hash: self._model.media_bytes(one.facts) for one in media}


def _round_up(positions: int) -> int:
    return -(-positions // STEP) * STEP
