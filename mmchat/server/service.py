"""What all requests share: the models, the thread of their engines, and who is being served."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from mmchat import limits
from mmchat.catalog.adapters import AdapterSource, find_adapters
from mmchat.errors import CheckpointError, UsageError, quoted
from mmchat.server.errors import ApiError
from mmchat.server.metrics import Metrics
from mmchat.server.options import ServerOptions

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.engine.driver import EngineThread
    from mmchat.engine.engine import Engine
    from mmchat.loading.loader import LoadedModel
    from mmchat.server.ask import Answering

T = TypeVar("T")
LATEST = ":latest"  # as Ollama's programs end a name without a tag
WORKERS = 2  # threads that parse large bodies and build prompts, and as many that open pictures


@dataclass(frozen=True)
class Names:
    """listed: the id of a model and its other names; known: all it answers to, in lower case."""

    listed: tuple[str, ...]
    known: frozenset[str]


@dataclass(frozen=True)
class Served:
    """A model, the engine that writes its answers, and what clients call it."""

    model: LoadedModel
    engine: Engine
    names: Names


class Service:
    """A model that is served, perhaps with adapters apart. Until `use` gives it one, it loads."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.is_draining = False
        self.held_bytes = 0  # of requests that wait for a row
        self._took: deque[float] = deque([1.0], 64)  # seconds, of the last answers
        self.all: tuple[Served, ...] = ()  # the first answers what names none of them
        self._thread: EngineThread | None = None
        self._workers = ThreadPoolExecutor(WORKERS, "mmchat request")
        self._picture_workers = ThreadPoolExecutor(WORKERS, "mmchat pictures")
        self._served: Counter[str] = Counter()  # requests by owner, waiting ones included
        self.answers: set[Answering] = set()  # that are written, or wait for a row
        self.ollama_sampling: dict[str, float] = {}

    def use(self, model: LoadedModel, *others: LoadedModel) -> None:
        """Serve this from now on, and what it is with adapters, which come first then.

        The last was loaded last; the rows of all share the memory that it leaves.
        """
        from mmchat.engine.driver import EngineThread
        from mmchat.engine.engine import Engine
        from mmchat.engine.room import usual_rows

        models = *others, model
        total = self.options.kv_memory or (others or models)[-1].memory
        self.memory = total and total // len(models)  # of each
        rows = self.options.rows or usual_rows(model, self.memory)
        self.rows = min(rows, model.most_rows)
        engines = [Engine(one, self.rows, memory=self.memory) for one in models]
        self._thread = EngineThread(*engines)
        self.ollama_sampling = _ollama_sampling(model)
        own, *named = names_of(
            model.spec, [find_adapters(one.adapters) for one in (model, *others)]
        )
        self.all = tuple(map(Served, models, engines, [*named, own]))

    def served(self, name: object) -> Served:
        """The model that a request names, else the first. Raises ApiError while there is none."""
        if not self.all:
            raise ApiError("loading")
        asked = name.casefold().removesuffix(LATEST) if isinstance(name, str) else ""
        found = (one for one in self.all if asked in one.names.known)
        return next(found, self.all[0])

    def close(self) -> None:
        """End the engine; answers that are not over fail. Returns when no thread is at work."""
        if self._thread is not None:
            self._thread.close()
        for workers in (self._workers, self._picture_workers):
            workers.shutdown(cancel_futures=True)

    @property
    def thread(self) -> EngineThread:
        """Raises ApiError where no answer can be begun."""
        if self.is_draining:
            raise ApiError("draining")
        if self._thread is None:
            raise ApiError("loading")
        if self._thread.error is not None:
            raise ApiError("server_error")
        return self._thread

    @property
    def failure(self) -> BaseException | None:
        """Why the engine's thread has ended: no answer will ever be written."""
        return self._thread.error if self._thread is not None else None

    @property
    def is_busy(self) -> bool:
        """Whether anybody is being served."""
        return self._served.total() > 0

    @property
    def status(self) -> str:
        """ "ok" if an answer would be begun now; else why not."""
        try:
            engines = self.thread.engines
        except ApiError as error:
            return "dead" if error.code == "server_error" else error.code
        # Seconds that a step may take while others wait: a CPU reads a long prompt for minutes,
        # and a first step may compile.
        is_first = not self.metrics.counts["generation_tokens_total"]
        patience = 300.0 if is_first or self.all[0].model.device.type == "cpu" else 30.0
        stalled = any(engine.is_stalled(patience) for engine in engines)
        return "stalled" if stalled else "ok"

    def drain(self) -> None:
        """Begin no more answers, nor those that wait."""
        self.is_draining = True
        for answer in list(self.answers):
            answer.refuse(ApiError("draining"))

    def interrupt(self) -> None:
        """End the answers that are being written, as far as they are."""
        for answer in list(self.answers):
            answer.end()

    @contextmanager
    def serving(self, owner: str) -> Iterator[None]:
        """A request of `owner` waits, or is answered. Raises ApiError if too many do."""
        if self._served[owner] >= self.rows + self.options.queue:
            raise ApiError("rate_limit_exceeded", retry_after=self.retry_after)
        self._served[owner] += 1
        begin = time.monotonic()
        try:
            yield
        finally:
            self._served[owner] -= 1
            self._took.append(time.monotonic() - begin)

    @property
    def retry_after(self) -> int:
        """Seconds until those who are here now may have been served."""
        seconds = self._served.total() * median(self._took) / self.rows
        return max(1, min(ceil(seconds), 60))

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """A function to say that so many more bytes wait with a request.

        It raises ApiError if all have too many together.
        """
        held = 0

        def more(size: int) -> None:
            nonlocal held
            if self.held_bytes + size > limits.QUEUED_BYTES:
                text = "too much data waits already; try again"
                raise ApiError("overloaded", text, retry_after=5)
            self.held_bytes += size
            held += size

        try:
            yield more
        finally:
            self.held_bytes -= held

    async def apart(self, work: Callable[[], T], *, pictures: bool = False) -> T:
        """Do this in a thread: the loop, which serves everybody, must not wait for it.

        pictures: it opens some, which may take long: texts do not wait for them.
        """
        workers = self._picture_workers if pictures else self._workers
        return await asyncio.get_running_loop().run_in_executor(workers, work)


def names_of(spec: ModelSpec, adapters: Sequence[Sequence[AdapterSource]]) -> list[Names]:
    """What clients call the model with each of `adapters`; the first is what it always has.

    One with an adapter has the name of that, also behind each name of the model. Raises UsageError
    if two would be called alike.
    """
    own = [spec.name, *(alias for alias in spec.aliases if alias != spec.name)]
    known = [*own, *filter(None, [spec.repo])]
    named: list[Names] = []
    for merged in adapters:
        name = "+".join(adapter.name for adapter in merged)
        behind = [f"{one}:{name}" for one in (*known, spec.family.ollama_name) if one and name]
        listed, more = ([name] if name else []), known if merged is adapters[0] else ()
        listed += own if merged is adapters[0] else ()
        names = Names(tuple(listed), frozenset(map(str.casefold, [*listed, *behind, *more])))
        if any(names.known & other.known for other in named):
            raise UsageError(
                f"two models would be called {quoted(name)}; rename the folder of one adapter"
            )
        named.append(names)
    return named


def _ollama_sampling(model: LoadedModel) -> dict[str, float]:
    """What Ollama's folder says of how to choose tokens, where the model was loaded from there."""
    from mmchat.checkpoints.ollama_folder import ollama_model

    name, spec, found = model.options.name, model.spec, None
    with suppress(CheckpointError):  # another one, or gone since
        found = ollama_model(str(name)) if name else None
    if found is None or found.weights != spec.source:
        return {}
    return {key: getattr(spec.generation, key) for key in found.sampling}
