"""Run a model that several ranks share: rank 0 makes the calls, and all others repeat them.

Every call of a runtime and of its caches that changes something is told before it is done, so the
caches of all ranks hold the same rows, each its own heads of them. Rank 0 alone samples.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmchat.errors import MemoryError_, MmchatError, RankError
from mmchat.hardware.allocation import memory_error
from mmchat.models.base import Batch
from mmchat.models.prompt import MediaFacts, PlacedMedia, Prompt
from mmchat.models.row_cache import RowCache
from mmchat.parallel.group import Group, without_interrupts
from mmchat.parallel.wire import hear, say

if TYPE_CHECKING:
    from mmchat.models.base import Cache
    from mmchat.models.prompt import Media
    from mmchat.runtime.base import Runtime

_ALLOCATING = frozenset({"reserve", "copy", "shrink", "release", "begin"})
_OTHERS = frozenset({"truncate", "free", "drop_media"})
# One driver may have several engines, in threads; all ranks must see one order of calls.
_turn = threading.RLock()


class Driver:
    """Rank 0's side of a group: numbers what it makes, and tells what is gone."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._numbers = itertools.count()
        self._gone: list[int] = []  # filled by the garbage collector, in any thread
        # by content hash: who lets the others hold a picture, and its number there
        self._pictures: dict[str, tuple[weakref.ref[Media], int]] = {}

    def new_number(self) -> int:
        return next(self._numbers)

    def keep(self, thing: object, number: int) -> None:
        """Let the others hold what they know by the number as long as `thing` lives here."""
        weakref.finalize(thing, self._gone.append, number).atexit = False

    def picture(self, media: Media) -> tuple[Media, int, bool]:
        """(who keeps it, its number, whether it is new): the others have it while that one lives.

        Hold that one until the number is told: of equal pictures another may have been first.
        """
        known = self._pictures.get(media.content_hash)
        keeper = known and known[0]()
        if known and keeper is not None:
            return keeper, known[1], False
        number = self.new_number()
        forget = partial(self._forget, media.content_hash, number)
        self._pictures[media.content_hash] = weakref.ref(media, forget), number
        self.keep(media, number)
        return media, number, True

    def _forget(self, content_hash: str, number: int, _: object) -> None:
        if self._pictures.get(content_hash, (None, None))[1] == number:
            del self._pictures[content_hash]

    @contextmanager
    def call(self, *message: Any, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
        """Tell the others a call that this block makes as well; it is whole or nothing goes on."""
        with _turn, without_interrupts():
            self.tell(*message, tensors=tensors)
            try:
                yield
            except (RankError, AllRefuse):
                raise
            except BaseException as error:
                lost = self.group.fail(error)
                if not isinstance(error, Exception):  # the process ends
                    raise
                raise lost from error

    def tell(self, *message: Any, tensors: Sequence[Tensor] = ()) -> None:
        """Tell the others what is no call of all together."""
        with _turn, without_interrupts():
            gone = [self._gone.pop(0) for _ in range(len(self._gone))]
            say(self.group, [gone, *message], tensors)

    def show_life(self) -> None:
        """Tell the others from now on, in a thread, that this rank is there."""

        def beat() -> None:
            with suppress(RankError):  # whoever is next to call is told
                while self.group.lost is None:
                    self.tell("life")
                    time.sleep(self.group.timeout / 4)

        threading.Thread(target=beat, name="mmchat ranks", daemon=True).start()

    def stop(self) -> None:
        """Let the others end, as a launcher waits for; one that is gone changes nothing."""
        if self.group.lost is None:
            with suppress(RankError):
                self.tell("stop")
            self.group.lost = RankError("the ranks that shared the model have ended")


@cache
def driver_of(group: Group) -> Driver:
    """The only one of the group."""
    driver = Driver(group)
    atexit.register(driver.stop)
    return driver


class AllRefuse(MemoryError_):
    """Memory that one rank does not have; all have left the call as if it had not been made."""


def together(group: Group, allocate: Callable[[], object]) -> None:
    """Allocate on all ranks. Raises AllRefuse on all where one has no room.

    What others have allocated by then they keep, so from then on ranks may have different room.
    """
    short: MemoryError_ | None = None
    try:
        allocate()
    except Exception as error:
        short = memory_error(error)
        if short is None:
            raise
    if not group.all_can(short is None):
        group.is_uneven = True
        raise AllRefuse(str(short or "out of memory on another rank"))


class MirroredCache:
    """A cache of rank 0, whose changes the others repeat (models.base.Cache)."""

    def __init__(self, driver: Driver, cache: Cache) -> None:
        self.cache = cache
        self._driver = driver
        self.number = driver.new_number()
        driver.keep(self, self.number)

    @property
    def lengths(self) -> Sequence[int]:
        return self.cache.lengths

    @property
    def fixed(self) -> bool:
        return self.cache.fixed

    def has_media(self, content_hash: str) -> bool:
        return self.cache.has_media(content_hash)

    def begin(self, slot: int, prompt: Prompt) -> None:
        placed = [(one.position, one.count, one.media.content_hash) for one in prompt.media]
        self._change("begin", (slot, prompt), (slot, prompt.token_ids, placed))

    def reserve(self, slot: int, length: int) -> None:
        self._change("reserve", (slot, length))

    def truncate(self, slot: int, length: int) -> None:
        self._change("truncate", (slot, length))

    def copy(self, source: int, target: int, length: int) -> None:
        self._change("copy", (source, target, length))

    def shrink(self, slot: int) -> None:
        self._change("shrink", (slot,))

    def free(self, slot: int) -> None:
        self._change("free", (slot,))

    def drop_media(self, content_hash: str) -> None:
        self._change("drop_media", (content_hash,))

    def release(self) -> None:
        self._change("release", ())

    def _change(self, name: str, args: Sequence[Any], told: Sequence[Any] | None = None) -> None:
        group = self._driver.group
        if group.lost is not None:  # rows are still put away
            getattr(self.cache, name)(*args)
            return
        with self._driver.call("cache", self.number, name, args if told is None else told):
            _change(group, self.cache, name, args)


def _change(group: Group, cache: Cache, name: str, args: Sequence[Any]) -> None:
    if name in _ALLOCATING:
        together(group, lambda: getattr(cache, name)(*args))
    else:
        getattr(cache, name)(*args)


class MirroredRuntime:
    """The runtime that rank 0's engine calls (runtime.base.Runtime)."""

    def __init__(self, driver: Driver, own: Runtime, number: int) -> None:
        self.device, self.notices, self.compile_seconds = own.device, own.notices, None
        self.own, self._driver, self._number = own, driver, number
        driver.keep(self, number)

    def new_cache(self, slots: int, positions: int) -> MirroredCache:
        made: list[Cache] = []
        # its number is given before it is made, as the others need it
        cache = MirroredCache(self._driver, None)  # type: ignore[arg-type]
        with self._driver.call("new_cache", self._number, cache.number, slots, positions):
            together(self._driver.group, lambda: made.append(self.own.new_cache(slots, positions)))
        cache.cache = made[0]
        return cache

    def encode(self, media: Sequence[Media], cache: MirroredCache) -> Iterator[Sequence[Media]]:
        driver = self._driver
        steps = self.own.encode(media, cache.cache)
        number = driver.new_number()
        driver.keep(steps, number)
        with _turn:  # nobody else tells of them before they are sent
            kept = [driver.picture(one) for one in media]
            new = [(one, its) for one, its, is_new in kept if is_new]
            told = [(its, one.content_hash, len(one.tensors)) for one, its in new]
            held = [its for _, its, _ in kept]
            message = ("encode", self._number, cache.number, number, held, told)
            tensors = [tensor for one, _ in new for tensor in one.tensors]
            with driver.call(*message, tensors=tensors):
                taken = next(steps, None)
        while taken is not None:
            yield taken
            with driver.call("slice", number):
                taken = next(steps, None)

    def forward(self, batch: Batch, cache: MirroredCache) -> Tensor:
        if batch.watch is not None:
            raise ValueError("no rank has all heads that would be watched")
        ids = batch.token_ids.tolist() if batch.token_ids.is_cpu else None
        rows = (batch.slots, batch.starts, batch.counts, batch.wanted)
        message = ("forward", self._number, cache.number, ids, rows, batch.scores)
        tensors = [batch.token_ids] if ids is None else []  # which waits for no device
        with self._driver.call(*message, tensors=tensors):
            return _forward(self._driver.group, self.own, batch, cache.cache)


def _forward(group: Group, runtime: Runtime, batch: Batch, cache: Cache) -> Tensor:
    if isinstance(cache, RowCache) and ((rows := cache.short_of(batch)) or group.is_uneven):
        together(group, lambda: [cache.reserve(slot, length) for slot, length in rows])
    return runtime.forward(batch, cache)


@dataclass(frozen=True)
class _Picture:
    """A picture as a follower has it (models.prompt.Media)."""

    content_hash: str
    tensors: tuple[Tensor, ...] = ()

    @property
    def facts(self) -> MediaFacts:
        raise NotImplementedError("followers tell people nothing")


class Follower:
    """The side of all other ranks. load: makes the runtime that rank 0 describes."""

    def __init__(self, group: Group, load: Callable[[Any, bool], Runtime]) -> None:
        self._group, self._load = group, load
        self._held: dict[int, Any] = {}  # by number
        self._device = torch.device("cpu")

    @torch.inference_mode()
    def follow(self) -> None:
        """Repeat what rank 0 does until it says "stop". Raises RankError when it is gone."""
        calls: dict[str, Callable[..., None]] = {
            "life": lambda _: None,
            "model": self._model,
            "new_cache": self._new_cache,
            "cache": self._cache,
            "encode": self._encode,
            "slice": self._slice,
            "forward": self._forward,
        }
        while True:
            message, tensors = hear(self._group, self._device)
            gone, name, *args = message
            for thing in gone:
                self._held.pop(thing, None)
            if name == "stop":
                return
            with suppress(AllRefuse):  # as on rank 0, which says what is next
                calls[name](tensors, *args)

    def _model(self, _: list[Tensor], number: int, options: Any, repack: bool) -> None:
        try:
            self._held[number] = runtime = self._load(options, repack)
        except MmchatError:  # which rank 0 has been told
            if self._group.lost is not None:
                raise
        else:
            self._device = runtime.device

    def _new_cache(
        self, _: list[Tensor], runtime: int, number: int, slots: int, positions: int
    ) -> None:
        def make() -> None:
            self._held[number] = self._held[runtime].new_cache(slots, positions)

        together(self._group, make)

    def _cache(self, _: list[Tensor], number: int, name: str, args: Sequence[Any]) -> None:
        if name not in _ALLOCATING | _OTHERS:
            raise ValueError(f"{name!r} is no call of a cache")
        if name == "begin":
            slot, ids, placed = args
            media = tuple(PlacedMedia(at, count, _Picture(h)) for at, count, h in placed)
            args = slot, Prompt(tuple(ids), media)
        _change(self._group, self._held[number], name, args)

    def _encode(
        self,
        tensors: list[Tensor],
        runtime: int,
        cache: int,
        number: int,
        pictures: Sequence[int],
        told: Sequence[tuple[int, str, int]],
    ) -> None:
        for its, content_hash, count in told:
            self._held[its] = _Picture(content_hash, tuple(tensors[:count]))
            del tensors[:count]
        media = [self._held[its] for its in pictures]
        self._held[number] = self._held[runtime].encode(media, self._held[cache])
        self._slice(tensors, number)

    def _slice(self, _: list[Tensor], number: int) -> None:
        next(self._held[number], None)

    def _forward(
        self,
        tensors: list[Tensor],
        runtime: int,
        cache: int,
        ids: list[int] | None,
        rows: Sequence[list[int]],
        scores: bool,
    ) -> None:
        slots, starts, counts, wanted = map(tuple, rows)
        token_ids = tensors[0] if ids is None else torch.tensor(ids, device=self._device)
        batch = Batch(token_ids, slots, starts, counts, wanted, scores)
        _forward(self._group, self._held[runtime], batch, self._held[cache])
