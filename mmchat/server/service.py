"""What all requests share: the model, the thread of its engine, and who is being served."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from mmchat import limits
from mmchat.errors import CheckpointError
from mmchat.server.errors import ApiError
from mmchat.server.metrics import Metrics
from mmchat.server.options import ServerOptions

if TYPE_CHECKING:
    from mmchat.engine.driver import EngineThread
    from mmchat.engine.engine import Engine
    from mmchat.loading.loader import LoadedModel
    from mmchat.server.ask import Answering

T = TypeVar("T")
WORKERS = 2  # threads that parse large bodies and build prompts, and as many that open pictures


class Service:
    """A model that is served. Until `use` gives it one, it is loading."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.is_draining = False
        self.held_bytes = 0  # of requests that wait for a row
        self._took: deque[float] = deque([1.0], 64)  # seconds, of the last answers
        self._model: LoadedModel | None = None
        self._thread: EngineThread | None = None
        self._workers = ThreadPoolExecutor(WORKERS, "mmchat request")
        self._picture_workers = ThreadPoolExecutor(WORKERS, "mmchat pictures")
        self._served: Counter[str] = Counter()  # requests by owner, waiting ones included
        self.answers: set[Answering] = set()  # that are written, or wait for a row
        self.ollama_sampling: dict[str, float] = {}

    def use(self, model: LoadedModel) -> None:
        """Serve this model from now on."""
        from mmchat.engine.driver import EngineThread
        from mmchat.engine.engine import Engine
        from mmchat.engine.room import usual_rows

        self.memory = self.options.kv_memory or model.memory
        rows = self.options.rows or usual_rows(model, self.memory)
        self.rows = min(rows, model.most_rows)
        self._thread = EngineThread(Engine(model, self.rows, memory=self.memory))
        self.ollama_sampling = _ollama_sampling(model)
        self._model = model

    def close(self) -> None:
        """End the engine; answers that are not over fail. Returns when no thread is at work."""
        if self._thread is not None:
            self._thread.close()
        for workers in (self._workers, self._picture_workers):
            workers.shutdown(cancel_futures=True)

    @property
    def model(self) -> LoadedModel:
        """Raises ApiError while it is being loaded."""
        if self._model is None:
            raise ApiError("loading")
        return self._model

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
    def engine(self) -> Engine:
        """Raises ApiError while the model is being loaded."""
        if self._thread is None:
            raise ApiError("loading")
        return self._thread.engine

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
        if self.is_draining:
            return "draining"
        if self._thread is None:
            return "loading"
        if self._thread.error is not None:
            return "dead"
        # Seconds that a step may take while others wait: a CPU reads a long prompt for minutes,
        # and a first step may compile.
        is_first = not self.metrics.counts["generation_tokens_total"]
        patience = 300.0 if is_first or self.model.device.type == "cpu" else 30.0
        return "stalled" if self._thread.engine.is_stalled(patience) else "ok"

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


def _ollama_sampling(model: LoadedModel) -> dict[str, float]:
    """What Ollama's folder says of how to choose tokens, where the model was loaded from there."""
    from mmchat.checkpoints.ollama_folder import ollama_model

    name, spec, found = model.options.name, model.spec, None
    with suppress(CheckpointError):  # another one, or gone since
        found = ollama_model(str(name)) if name else None
    if found is None or found.weights != spec.source:
        return {}
    return {key: getattr(spec.generation, key) for key in found.sampling}
