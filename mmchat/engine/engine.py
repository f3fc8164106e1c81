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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmchat.engine.drafts import Pace
from mmchat.engine.prefix import Place, Prefixes
from mmchat.engine.reading import Encoding, Read, apart, joinable, joined
from mmchat.engine.request import Answer, Request
from mmchat.engine.room import Queue, Room
from mmchat.engine.row import Row, unanswered
from mmchat.errors import MemoryError_, NumericalError, RankError
from mmchat.hardware.allocation import memory_error

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.loading.loader import LoadedModel

# Positions of prompts that are read at once where there are several rows: large enough that
# products of matrices run at full speed, on a CPU and on a device, and small enough that those who
# write or come meanwhile, and whoever cancels, do not wait long.
PIECE, DEVICE_PIECE = 256, 512
SHORT = 64  # positions of a prompt that need not wait for a piece of a longer one
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
        self._active: list[Row] = []
        self._turns: deque[Row] = deque()  # of those that read their prompt
        self._short_first = False  # whether the last piece was of short prompts before their turn
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
            first = self._turns[0] if self._turns else None
            if first and first.unencoded(self.cache):
                self._forward(tokens)
                self._encode()
                if self._turns and self._turns[0] is first:
                    self._turns.rotate(-1)
            else:
                pieces = self._next_pieces() if first else []
                if any(row.watch for row, _ in pieces):
                    self._forward(tokens)
                    tokens = []
                self._forward([*tokens, *pieces])
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
            self._room.take(place, answer.request)
            row = Row(answer, place.slot, place.shared, self._model, self._pace)
        except BaseException as error:
            self._room.leave(place.slot, [])
            answer.fail(memory_error(error) or error)
            if not isinstance(error, Exception):
                raise
            return
        self._active.append(row)
        self._turns.append(row)
        slot, marks = row.slot, row.slot.marks
        with self._ending(row):
            if place.source is not slot and row.shared:
                slot.marks = []  # until it holds them: copying may run out of memory
                self.cache.truncate(slot.number, 0)
                self.cache.copy(place.source.number, slot.number, row.shared)
                slot.marks = marks
            else:
                self.cache.truncate(slot.number, row.shared)
            self._room.begin(slot, row.prompt)
            row.unseen = row.prompt.unread(row.shared)
            self.known += len(row.prompt.media) - len(row.unencoded(self.cache))

    def _drop_cancelled(self) -> None:
        for answer in [answer for answer in self._waiting if answer.is_cancelled]:
            self._waiting.remove(answer)
            answer.add(unanswered(answer.request))
        for row in [row for row in self._active if row.answer.is_cancelled]:
            row.finish("interrupted")
            read = self.cache.lengths[row.slot.number]
            self._leave(row, row.marks() if row.is_writing else row.prompt.fingerprint[:read])

    def _leave(self, row: Row, marks: Sequence[int | str]) -> None:
        """The row is over; its slot keeps the positions of `marks` for those who share them."""
        self._active.remove(row)
        if row in self._turns:
            self._turns.remove(row)
        if self._encoding and not any(map(self._encoding.is_for, self._turns)):
            self._encoding = None
        self._room.leave(row.slot, marks)

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
            row.answer.fail(error)
            self._leave(row, row.slot.marks)
            raise
        # After the handler nothing holds what the failed call had allocated.
        if failure is not None:
            self._end(row, failure)
        elif row.is_over:
            self._leave(row, row.marks())

    def _end(self, row: Row, failure: Exception) -> None:
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

    def _encode(self) -> None:
        """One slice of the pictures that were begun, or of the first that somebody waits for.

        Those of all rows are offered: what a model encodes together costs it less. If that fails,
        the first is tried alone; if it fails too, the row that waits for it ends.
        """
        wanted = (media for row in self._turns for media in row.unencoded(self.cache))
        each_once = {media.content_hash: media for media in wanted}
        encoding = self._encoding or Encoding(list(each_once.values()))
        self._encoding = None  # unless it goes on
        row = next(row for row in self._turns if encoding.is_for(row))
        with self._ending(row):
            if encoding.step(self._runtime, self.cache, self.release):
                if any(map(encoding.is_for, self._turns)):  # else the row of the first is gone
                    self._encoding = encoding
                return
            waited = [row for row in self._turns if row.unseen]
            waiting = Counter(one.content_hash for row in waited for one in row.unseen)
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
            for row in waited:
                if not row.unencoded(self.cache):
                    row.encoded()

    # ---- one step of rows

    def _next_tokens(self) -> list[tuple[Row, Tensor]]:
        """What those read that write: their last token, or a draft."""
        read = []
        for row in [row for row in self._active if row.is_writing]:
            with self._ending(row):
                tokens = row.reads()
                if not row.is_over:
                    read.append((row, tokens))
        if read:
            self.steps[len(read)] += 1
        return read

    def _next_pieces(self) -> list[tuple[Row, Tensor]]:
        """Pieces of the prompts whose pictures are encoded, as many as a slice takes.

        Every second slice may be of short ones alone, so that these do not wait for a long one of
        others, nor that one for ever.
        """
        import torch

        ready = joinable([row for row in self._turns if not row.unencoded(self.cache)])
        short = [row for row in ready if row.unread(self.cache) <= SHORT]
        self._short_first = bool(short) and len(short) < len(ready) and not self._short_first
        if self._short_first:
            ready = short
        left = PIECE if self._runtime.device.type == "cpu" else DEVICE_PIECE
        if self.rows == 1:  # nobody else can begin meanwhile
            left = max(left, len(ready[0].prompt.token_ids))
        read = []
        for row in ready:
            start = self.cache.lengths[row.slot.number]
            end = row.scores.end(start, min(start + left, len(row.prompt.token_ids)))
            piece = row.prompt.token_ids[start:end]
            read.append((row, torch.tensor(piece, device=self._runtime.device)))
            left -= len(piece)
            if not left:
                break
        if not self._short_first:  # else it is still the turn of who was first
            self._turns.rotate(-1)
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
                    self._has_read(row, part, begin if len(read) == 1 else None)
        elif isinstance(logits, MemoryError_) and len(parts := apart(read)) > 1:
            for part in parts:
                self._forward(part)
        elif len(read) == 1 or isinstance(logits, MemoryError_):
            self._end(read[-1][0], logits)
            if len(read) > 1:
                self._forward(read[:-1])
        else:
            for one in read:
                self._forward([one])

    def _logits(self, read: Read) -> Sequence[Tensor] | Exception:
        """Of what each row wants, without rows of the head that stand for no token; or why none."""
        try:
            batch, counts = joined(read, self.cache.lengths)
            logits = self._runtime.forward(batch, self.cache)
            return logits[:, : self._model.vocab_size].split(counts)
        except Exception as error:
            return memory_error(error) or error
        except BaseException as error:
            for row, _ in read:
                row.answer.fail(error)
                self._leave(row, row.slot.marks)
            raise

    def _has_read(self, row: Row, logits: Tensor, begin: float | None) -> None:
        slot = row.slot.number
        if row.is_writing:
            row.has_stepped(logits, begin)
            if self.cache.lengths[slot] > row.positions:  # tokens of a draft that were wrong
                self.cache.truncate(slot, row.positions)
            return
        row.scores.read(logits, self.cache.lengths[slot])
        if self.cache.lengths[slot] == len(row.prompt.token_ids):
            self._turns.remove(row)
            row.has_read(logits[-1:])
