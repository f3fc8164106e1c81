"""One answer while it is written: sampling, drafts, text, timings."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from mmchat.engine.drafts import Drafter, Pace
from mmchat.engine.events import FinishReason, Progress, TextDelta, TokenLogprob
from mmchat.engine.sampling import NOT_FINITE, PromptScores, Sampler, token_logprobs
from mmchat.engine.text import AnswerText
from mmchat.errors import NumericalError
from mmchat.models.base import cache_lacks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.engine.prefix import Place
    from mmchat.engine.request import Answer
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.base import Cache
    from mmchat.models.prompt import Media

clock = time.perf_counter


class Row:
    """An answer in its slot: first it reads its prompt, then it writes.

    token, logits: [1, 1] and [1, V], what was sampled last and from what; the token is not in the
    cache yet. On a device that works by itself the step that reads a token is queued before the
    token is known here, so the device never waits for the host; a stop then costs a step that
    nobody needs.
    """

    def __init__(
        self, answer: Answer, place: Place, cache: Cache, model: LoadedModel, pace: Pace
    ) -> None:
        request = answer.request
        prompt, params = request.prompt, request.sampling
        self.answer, self.slot, self.shared = answer, place.slot, place.shared
        self.prompt, self.params, self.timings = prompt, params, request.timings
        self.watch = request.watch
        self.scores = PromptScores(prompt.token_ids, request.score_from, params.logprobs)
        self.token: Tensor | None = None
        self._logits: Tensor | None = None
        self._cache, self._model = cache, model
        device = model.runtime.device
        self._sampler = Sampler(params, list(prompt.token_ids), model.vocab_size, device)
        self._stop_ids = () if request.ignore_stop else model.processor.stop_ids
        self._drafter = Drafter(
            prompt.token_ids,
            params.speculate,
            pace,
            stop_ids=self._stop_ids,
            vocab_size=model.vocab_size,
        )
        self._text = AnswerText(model.tokenizer, params.stop, prompt.lead)
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._arriving: HostCopy | None = None  # of a token that is not known here yet
        self._guide = request.grammar.begin() if request.grammar else None
        # Log-probabilities are read from the device, which waits for all that is queued. A grammar
        # needs each token before it can say what may follow; it finds that out while the device
        # works on the step that reads the token.
        self._runs_ahead = is_asynchronous(device) and not params.logprobs and not self._guide
        self._draft: list[int] = []
        self._guessed = self._guessed_right = 0
        self._first = self._last_arrival = 0.0
        self.began = clock()
        answer.add(Progress("vision" if prompt.media else "prefill"))

    @property
    def is_writing(self) -> bool:
        return self.token is not None

    @property
    def is_over(self) -> bool:
        return self.answer.is_over

    @property
    def held(self) -> int:
        """How many positions its slot holds."""
        return self._cache.lengths[self.slot.number]

    @property
    def unread(self) -> int:
        """Positions of its prompt that are still to be read."""
        return len(self.prompt.token_ids) - self.held

    def unencoded(self) -> list[Media]:
        """The pictures that must be encoded before it reads on."""
        return cache_lacks(self._cache, self.prompt.unread(self.held))

    @property
    def _left(self) -> int:
        return self.params.max_new_tokens - len(self._ids)

    # ---- reading and writing

    def encoded(self) -> None:
        """All pictures that it waited for are in the cache."""
        self.timings.vision_seconds = clock() - self.began
        self.began = clock()

    def next_piece(self, most: int) -> Tensor:
        """What is read next of its prompt: [S], at most so many."""
        import torch

        start = self.held
        end = self.scores.end(start, min(start + most, len(self.prompt.token_ids)))
        return torch.tensor(self.prompt.token_ids[start:end], device=self._model.runtime.device)

    def next_tokens(self) -> Tensor:
        """What it reads next where it writes: [S], the last token and a draft after it."""
        import torch

        if self._arriving and not self._may_run_ahead():
            self._arrive()
        token = self.token
        if token is None or self.is_over:
            return torch.empty(0, dtype=torch.long)
        if self._arriving:
            return token[0].clamp(min=0)  # NOT_FINITE has no row in the embedding
        self._draft = self._drafted()
        if not self._draft:
            return token[0]
        return torch.cat((token[0], torch.tensor(self._draft, device=token.device)))

    def has_read(self, logits: Tensor, begin: float | None) -> None:
        """What was to be read next was read. logits: [W, V] of what was wanted of it.

        begin: when the step began; None if other rows took part, which tells nothing of drafts.
        """
        if self.is_writing:
            self._has_stepped(logits, begin)
            # a token on its way is not among the ids yet; one that has arrived is, but is not read
            unread = 0 if self._arriving else 1
            right = len(self.prompt.token_ids) + len(self._ids) - unread
            if self.held > right:  # tokens of a draft that were wrong
                self._cache.truncate(self.slot.number, right)
            return
        self.scores.read(logits, self.held)
        if not self.unread:
            last = logits[-1:]
            self._sampled(self._sample(last), last)
            if not self._may_run_ahead():
                self._arrive()

    def _has_stepped(self, logits: Tensor, begin: float | None) -> None:
        """What `next_tokens` gave was read. logits: [S, V] of all of it."""
        if self._arriving:
            upcoming = self._sample(logits)  # queued before the host waits in `_arrive`
            self._arrive()
            now = clock()
            if self._last_arrival:  # between two that came while the device was busy lies one step
                self._drafter.stepped(now - self._last_arrival)
            self._last_arrival = now
            if not self.is_over:
                self._sampled(upcoming, logits)
            return
        self._last_arrival = 0.0  # the host waits below: the next arrival would be timed with that
        right = 0
        while True:
            token = self._sample(logits[right, None])
            token_id = int(token)  # waits for the device
            if right == len(self._draft) or token_id != self._draft[right]:
                break
            self._accept(token_id)
            right += 1
        self._guessed += len(self._draft)
        self._guessed_right += right
        if begin is not None and self._draft:
            self._drafter.verified(len(self._draft), right, clock() - begin)
        elif begin is not None:
            self._drafter.stepped(clock() - begin)
        for at in range(right):
            self._emit(self._draft[at], logits[at, None])
            if self.is_over:
                return
        self._sampled(token, logits[right, None])
        if not self._may_run_ahead():
            self._arrive()

    def _drafted(self) -> list[int]:
        """What the next tokens may be: what must follow, else a guess, as far as it can be right.

        A draft ends before the answer does, since nothing can follow there.
        """
        if self._guide is None:
            return self._drafter.draft(self._left - 1)
        draft = self._drafter.draft(self._left - 1, self._guide.forced())
        ends = next((at for at, one in enumerate(draft) if one in self._stop_ids), len(draft))
        return self._drafter.shortened(self._guide.valid(draft[:ends]))

    def _sample(self, logits: Tensor) -> Tensor:
        return self._sampler.sample(logits, self._guide.allowed() if self._guide else None)

    def _accept(self, token_id: int) -> None:
        if self._guide and token_id != NOT_FINITE:
            self._guide.accept(token_id)

    def _sampled(self, token: Tensor, logits: Tensor) -> None:
        self.token, self._logits = token, logits
        self._arriving = HostCopy(token)

    def _may_run_ahead(self) -> bool:
        """Not past the end, and not where a draft may follow: that needs the token's id first."""
        return self._runs_ahead and self._left > 1 and not self._drafter.draft(1)

    def _arrive(self) -> None:
        """Wait for the token that was sampled last."""
        arriving, logits = self._arriving, self._logits
        if arriving is None or logits is None:
            return
        token_id = arriving.read()
        self._arriving = None
        self._accept(token_id)
        self._emit(token_id, logits)

    def _emit(self, token_id: int, logits: Tensor) -> None:
        """The answer goes on with this token, or ends."""
        self._drafter.append(token_id)
        self._time_token()
        if token_id == NOT_FINITE:
            raise NumericalError(
                f"the model produced NaN or infinite logits at token {len(self._ids) + 1}; "
                "try --dtype float32, if another is in use, or check the weights"
            )
        self._ids.append(token_id)
        is_stop = token_id in self._stop_ids
        logprob: TokenLogprob | None = None
        if self.params.logprobs:
            [logprob] = token_logprobs(logits, [token_id], self.params.logprobs)
            self._logprobs.append(logprob)
        piece = "" if is_stop else self._text.push(token_id)
        self._pieces.append(piece)
        self.answer.add(TextDelta(piece, token_id, logprob))
        if is_stop:
            self.finish("stop")
        elif self._text.stopped:
            self.finish("stop_string")
        elif self._guide and self._guide.length == len(self._ids):
            self.finish("stop")  # the value is complete: no token would say so
        elif self.answer.is_cancelled:
            self.finish("interrupted")
        elif not self._left:
            self.finish("length")

    def _time_token(self) -> None:
        now, timings = clock(), self.timings
        if not self._ids:
            self._first = now
            timings.prefill_seconds = now - self.began
            timings.time_to_first_token = now - timings.started
            return
        timings.decode_seconds = now - self._first
        timings.tokens_per_second = len(self._ids) / timings.decode_seconds

    # ---- ending

    def marks(self) -> list[int | str]:
        """Fingerprint of the positions that its slot may keep: the last token may be unread."""
        return [*self.prompt.fingerprint, *self._ids[:-1]][: self.held]

    def finish(self, reason: FinishReason) -> None:
        tail = self._text.flush()
        if tail:
            self._pieces.append(tail)
            self.answer.add(TextDelta(tail, None))
        self.timings.peak_memory_bytes = self._model.peak_memory()
        empty = self.answer.request.unanswered()
        self.answer.add(
            replace(
                empty,
                reason=reason,
                text="".join(self._pieces),
                usage=replace(
                    empty.usage,
                    cached_tokens=self.shared,
                    completion_tokens=len(self._ids),
                    draft_tokens=self._guessed,
                    accepted_tokens=self._guessed_right,
                ),
                output_ids=tuple(self._ids),
                logprobs=tuple(self._logprobs),
                prompt_logprobs=tuple(self.scores.entries),
                seed=self._sampler.seed,
            )
        )


def is_asynchronous(device: torch.device) -> bool:
    """Whether work is queued on the device while the host goes on."""
    return device.type == "cuda"


class HostCopy:
    """A token on its way to the host; work that is queued later does not delay it."""

    def __init__(self, token: Tensor) -> None:
        import torch

        self._token = token
        self._arrival: torch.cuda.Event | None = None
        if token.device.type == "cuda":
            # a copy to memory that is not pinned would wait for the device
            self._token = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._token.copy_(token, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(token.device))

    def read(self) -> int:
        """Wait for the token."""
        if self._arrival:
            self._arrival.synchronize()
        return int(self._token)
