"""Run a model that several ranks share: rank 0 makes the calls, and all others repeat them.

Every call of a runtime and of its caches that changes something is told before it is done, so the
caches of all ranks hold the same rows, each its own heads of them. Rank 0 alone samples.
"""

from __future__ import annotations

import atexit
import itertools
import threading
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

# The calls that change a cache, and whether they take memory, which a rank may not have.
CHANGES = {
    "begin": True, "reserve": True, "copy": True, "shrink": True, "release": True,
    "truncate": False, "free": False, "drop_media": False,
}  # fmt: skip
# One driver may have several engines, in threads; all ranks must see one order of calls.
_turn = threading.RLock()


class Driver:
    """Rank 0's side of a group: numbers what it makes, and tells what is gone."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._numbers = itertools.count()
        self._life: threading.Thread | None = None
        self._is_stopping = threading.Event()
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
                    if self._is_stopping.wait(self.group.timeout / 4):
                        return

        self._life = threading.Thread(target=beat, name="mmchat ranks", daemon=True)
        self._life.start()

    def stop(self) -> None:
        """Let the others end, as a launcher waits for; one that is gone changes nothing."""
        self._is_stopping.set()
        if self._life is not None:
            self._life.join()  # a thread within torch's code would abort the process as it ends
        if self.group.lost is None:
            with suppress(RankError):
                self.tell("stop")
                self.group.close()
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

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.cache: Any = None  # its number is given before it is made, as the others need it
        self.number = driver.new_number()
        driver.keep(self, self.number)

    def __getattr__(self, name: str) -> Any:
        """What changes nothing is that of rank 0's own cache."""
        return partial(self._change, name) if name in CHANGES else getattr(self.cache, name)

    def _change(self, name: str, *args: Any) -> None:
        group = self._driver.group
        if group.lost is not None:  # rows are still put away
            getattr(self.cache, name)(*args)
            return
        with self._driver.call("cache", self.number, name, [_told(one) for one in args]):
            _change(group, self.cache, name, args)


def _told(argument: Any) -> Any:
    """As JSON can say it: of a prompt what a cache reads of it."""
    if not isinstance(argument, Prompt):
        return argument
    placed = [(one.position, one.count, one.media.content_hash) for one in argument.media]
    return argument.token_ids, placed


def _change(group: Group, cache: Cache, name: str, args: Sequence[Any]) -> None:
    change = partial(getattr(cache, name), *args)
    if CHANGES[name]:
        together(group, change)
    else:
        change()


class MirroredRuntime:
    """The runtime that rank 0's engine calls (runtime.base.Runtime)."""

    def __init__(self, driver: Driver, own: Runtime, number: int) -> None:
        self.device, self.notices, self.compile_seconds = own.device, own.notices, None
        self.own, self._driver, self._number = own, driver, number
        driver.keep(self, number)

    def new_cache(self, slots: int, positions: int) -> MirroredCache:
        mirrored = MirroredCache(self._driver)

        def make() -> None:
            mirrored.cache = self.own.new_cache(slots, positions)

        with self._driver.call("new_cache", self._number, mirrored.number, slots, positions):
            together(self._driver.group, make)
        return mirrored

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
        while True:
            (gone, *message), tensors = hear(self._group, self._device)
            for thing in gone:
                self._held.pop(thing, None)
            if message == ["stop"]:
                return
            with suppress(AllRefuse):  # as on rank 0, which says what is next
                self._do(message, tensors)

    def _do(self, message: list[Any], tensors: list[Tensor]) -> None:
        held = self._held
        match message:
            case ["life"]:
                pass
            case ["model", number, options, repack]:
                self._load_model(number, options, repack)
            case ["new_cache", runtime, number, slots, positions]:
                make = partial(held[runtime].new_cache, slots, positions)
                together(self._group, lambda: held.update({number: make()}))
            case ["cache", number, name, args]:
                if name == "begin":
                    args[1] = _heard(*args[1])
                _change(self._group, held[number], name, args)
            case ["encode", runtime, cache, number, pictures, told]:
                for its, content_hash, count in told:
                    held[its] = _Picture(content_hash, tuple(tensors[:count]))
                    del tensors[:count]
                held[number] = held[runtime].encode([held[one] for one in pictures], held[cache])
                next(held[number], None)
            case ["slice", number]:
                next(held[number], None)
            case ["forward", runtime, cache, ids, rows, scores]:
                token_ids = tensors[0] if ids is None else torch.tensor(ids, device=self._device)
                slots, starts, counts, wanted = map(tuple, rows)
                batch = Batch(token_ids, slots, starts, counts, wanted, scores)
                _forward(self._group, held[runtime], batch, held[cache])
            case _:
                raise ValueError(f"{message[0]!r} is no call of a model that is shared")

    def _load_model(self, number: int, options: Any, repack: bool) -> None:
        try:
            self._held[number] = runtime = self._load(options, repack)
        except MmchatError:  # which rank 0 has been told
            if self._group.lost is not None:
                raise
        else:
            self._device = runtime.device


def _heard(ids: Sequence[int], placed: Sequence[Any]) -> Prompt:
    """A prompt as `_told` says it."""
    media = tuple(PlacedMedia(at, count, _Picture(of)) for at, count, of in placed)
    return Prompt(tuple(ids), media)
