"""The only loop in the house: many answers, each step one token further and one slice of reading.

A step reads one token, or a draft, of all rows that write, and does one slice of reading: pieces of
the text of new prompts, or of the pictures that these wait for. So those who write wait for no
one's long prompt, and nobody who waits to be read is forgotten. Where rows may be of any length,
pieces are read in the same forward as the tokens, which then cost little: the weights are read
once. The engine has no thread: whoever calls `step` does the work, one at a time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmchat.engine.drafts import Pace
from mmchat.engine.prefix import Place, Prefixes
from mmchat.engine.reading import Encoding, Read, Turns, apart, joined
from mmchat.engine.request import Answer, Request
from mmchat.engine.room import Queue, Room
from mmchat.engine.row import Row
from mmchat.errors import MemoryError_, NumericalError, RankError
from mmchat.hardware.allocation import memory_error

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import Media

INITIAL_POSITIONS = 256  # beyond a prompt; a row grows when they are used


class Engine:
    """Answers requests for one model. rows: how many it writes at once; others wait. positions:
    room of each row to begin with. memory: bytes that rows and their pictures may take, None for
    any number; a row begins when all that it may come to need is free.

    Calls of `step` and `cancel` from several threads wait for each other; `submit` waits for none.
    """

    def __init__(
        self,
        model: LoadedModel,
        rows: int = 1,
        positions: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.rows = rows
        if positions is None:  # of several rows many may never be used
            positions = 0 if rows > 1 else INITIAL_POSITIONS
        self.cache = model.runtime.new_cache(rows, positions)
        self.prefixes = Prefixes(rows)
        self._model = model
        self._runtime = model.runtime
        self._pace = Pace()
        self._room = Room(self.cache, self.prefixes, model, memory)
        self._waiting = Queue(rows)
        self._active: list[Row] = []  # the oldest first
        self._turns = Turns(rows, self._runtime.device)  # of those that read their prompts
        self._encoding: Encoding | None = None  # what some of them wait for
        self._lock = threading.RLock()
        self._is_stepping = False
        self._step_began = time.monotonic()
        self.steps: Counter[int] = Counter()  # by how many rows they wrote
        self.encoded = self.known = 0  # pictures of prompts: encoded, and known already

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._active or self._waiting)

    @property
    def waiting(self) -> int:
        """How many wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many are read or written now."""
        return len(self._active)

    @property
    def bytes_used(self) -> int:
        """Of rows, pictures, and what is kept of those that are over; 0 without a limit."""
        return self._room.used

    def is_stalled(self, seconds: float) -> bool:
        """Whether some wait while one step takes longer than that."""
        taken = time.monotonic() - self._step_began
        return self.waiting > 0 and self._is_stepping and taken > seconds

    def submit(self, request: Request, tell: Callable[[], object] | None = None) -> Answer:
        """Put a request in the queue; `step` until its answer is over. tell: as in Answer.

        Raises MemoryError_ if it needs more memory than there is for all rows together.
        """
        self._room.check(request)
        answer = Answer(request, tell)
        self._waiting.add(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer at once; its slot is free when this returns."""
        answer.cancel()
        with self._lock:
            if not self._is_stepping:  # as when a generator is collected in the middle of a step
                with self._working():
                    self._drop_cancelled()

    def step(self) -> bool:
        """One token of all that write, one slice of what is read; whether there is more to do.

        Raises RankError, after which there is nothing to step.
        """
        with self._lock, self._working():
            self._step_began = time.monotonic()
            self._drop_cancelled()
            tokens = self._next_tokens()
            if self.cache.fixed:  # who comes is put in place while the device works on these
                self._forward(tokens)
                tokens = []
            self._admit()  # who came meanwhile is read in this step
            pieces = self._turns.next_pieces()
            if any(row.watch for row, _ in pieces):  # no other row may be read beside it
                self._forward(tokens)
                tokens = []
            self._forward([*tokens, *pieces])
            if not pieces:  # it is the turn of one who waits for a picture, or nobody reads
                self._encode(self._turns.next_pictures())
            return self.has_work

    def fail(self, error: BaseException) -> None:
        """End all answers with this error, as when nobody will step any more."""
        with self._lock, self._working():
            for answer in list(self._waiting):
                self._waiting.remove(answer)
                answer.fail(error)
            for row in self._active:
                row.answer.fail(error)
            for row in list(self._active):
                self._leave(row, row.slot.marks)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Whoever cancels from within is heard afterwards."""
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    # ---- who is there

    def _admit(self) -> None:
        while self.prefixes.has_room:
            answer = self._waiting.next(Counter(row.answer.request.owner for row in self._active))
            place = None if answer is None else self._room.place(answer.request)
            if answer is None or place is None:
                return
            self._waiting.remove(answer)
            self._take(answer, place)

    def _take(self, answer: Answer, place: Place) -> None:
        try:
            row = Row(answer, place, self.cache, self._model, self._pace)
        except BaseException as error:
            self._room.free(place.slot)  # so that the next one has more memory
            answer.fail(memory_error(error) or error)
            if not isinstance(error, Exception):
                raise
            return
        with self._ending(row):  # from the first moment on: it holds what its slot held before
            self._active.append(row)
            self._turns.add(row)
            self._room.take(place, answer.request)
            self.known += len(row.prompt.media) - len(row.unencoded())

    def _drop_cancelled(self) -> None:
        for answer in [answer for answer in self._waiting if answer.is_cancelled]:
            self._waiting.remove(answer)
            answer.add(answer.request.unanswered())
        for row in list(self._active):
            if row.answer.is_over:  # Ctrl-C came while it left
                self._leave(row, row.slot.marks)
            elif row.answer.is_cancelled:
                row.finish("interrupted")
                self._leave(row, row.marks())

    def _leave(self, row: Row, marks: Sequence[int | str]) -> None:
        """The row is over; its slot keeps the positions of `marks` for those who share them.

        It is active until its slot is free, so that Ctrl-C in between loses none.
        """
        self._turns.remove(row)
        if self._encoding and not any(map(self._encoding.is_for, self._turns)):
            self._encoding = None
        self._room.leave(row.slot, marks)
        if row in self._active:  # else it was just about to come in
            self._active.remove(row)

    @contextmanager
    def _ending(self, row: Row) -> Iterator[None]:
        """A failure ends the row, which then keeps what it shared, and no other row.

        So does Ctrl-C in the middle of its work, which is raised.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = memory_error(error) or error
        except BaseException as error:
            self._end(row, error)
            raise
        # After the handler nothing holds what the failed call had allocated.
        if failure is not None:
            self._end(row, failure)
        elif row.is_over:
            self._leave(row, row.marks())

    def _end(self, row: Row, failure: BaseException) -> None:
        row.answer.fail(failure)
        # what was not a number lies in the slot, and would spoil whoever is read there next
        self._leave(row, [] if isinstance(failure, NumericalError) else row.slot.marks)
        if isinstance(failure, MemoryError_):
            self.release()
        if isinstance(failure, RankError):  # no row can go on
            raise failure

    def release(self) -> None:
        """Give back what no running row needs, as far as that is possible without memory."""
        with self._lock:
            try:
                self._room.release()
            except Exception as error:
                if memory_error(error) is None:
                    raise

    # ---- one slice of pictures

    def _encode(self, wanted: Sequence[tuple[Row, Media]]) -> None:
        """One slice of the pictures that were begun, or of the first that somebody waits for.

        wanted: those of all rows, and all are offered: what a model encodes together costs it less.
        If that fails, the first is tried alone; if it fails too, the row that waits for it ends.
        """
        if not wanted:
            return
        each_once = {media.content_hash: media for _, media in wanted}
        encoding = self._encoding or Encoding(list(each_once.values()))
        self._encoding = None  # unless it goes on
        row = next(row for row, _ in wanted if encoding.is_for(row))
        with self._ending(row):
            if encoding.step(self._runtime, self.cache, self.release):
                if any(map(encoding.is_for, self._turns)):  # else the row of the first is gone
                    self._encoding = encoding
                return
            waiting = Counter(media.content_hash for _, media in wanted)
            for media in encoding.media:
                rows = waiting[media.content_hash]
                if not rows:  # its row is gone, and what was promised to it
                    self.cache.drop_media(media.content_hash)
                elif self.cache.has_media(media.content_hash):
                    self._room.encoded(media)
                    self.encoded += 1
                    self.known += rows - 1
            if self._runtime.device.type == "cuda":  # so that it is timed under its own name
                import torch

                torch.cuda.synchronize(self._runtime.device)
            for row in dict(wanted):
                if not row.unencoded():
                    row.encoded()

    # ---- one step of rows

    def _next_tokens(self) -> list[tuple[Row, Tensor]]:
        """What those read that write: their last token, or a draft."""
        read = []
        for row in [row for row in self._active if row.is_writing]:
            with self._ending(row):
                tokens = row.next_tokens()
                if not row.is_over:
                    read.append((row, tokens))
        if read:
            self.steps[len(read)] += 1
        return read

    def _forward(self, read: Read) -> None:
        """One step of these rows. If it fails, each takes it alone, and the guilty ends.

        Where memory runs out it is tried again with what idle slots gave back, then those who write
        and those who read their prompts apart, and then without the last row, the youngest, which
        ends: the older have more to lose.
        """
        if not read:
            return
        begin = time.perf_counter()
        logits = self._logits(read)
        if isinstance(logits, MemoryError_):
            self.release()
            logits = self._logits(read)
        if not isinstance(logits, Exception):
            for (row, _), part in zip(read, logits, strict=True):
                with self._ending(row):
                    row.has_read(part, begin if len(read) == 1 else None)
                    if row.is_writing:  # all of its prompt is read
                        self._turns.remove(row)
        elif isinstance(logits, MemoryError_) and len(parts := apart(read)) > 1:
            for part in parts:
                self._forward(part)
        elif len(read) == 1 or isinstance(logits, MemoryError_):
            self._end(read[-1][0], logits)
            self._forward(read[:-1])
        else:
            for one in read:
                self._forward([one])

    def _logits(self, read: Read) -> Sequence[Tensor] | Exception:
        """Of what each row wants, without rows of the head that stand for no token; or why none."""
        try:
            batch, counts = joined(read)
            logits = self._runtime.forward(batch, self.cache)
            return logits[:, : self._model.vocab_size].split(counts)
        except Exception as error:
            return memory_error(error) or error
        except BaseException as error:
            for row, _ in read:
                self._end(row, error)
            raise
