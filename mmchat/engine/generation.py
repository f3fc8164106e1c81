"""The prefill and decode loop: prompt in, tokens out, with stop rules and timings."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.engine.events import FinishReason, Timings, TokenLogprob
from mmchat.engine.sampling import NOT_FINITE, Sampler
from mmchat.errors import NumericalError
from mmchat.models.base import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmchat.engine.drafts import Drafter
    from mmchat.models.base import Cache
    from mmchat.models.prompt import Prompt
    from mmchat.runtime.base import Runtime


@dataclass(frozen=True)
class GeneratedToken:
    """A sampled token; `is_stop` ones end the answer and have no text."""

    token_id: int
    is_stop: bool
    logprob: TokenLogprob | None = None


def generate_tokens(
    runtime: Runtime,
    prompt: Prompt,
    cache: Cache,
    sampler: Sampler,
    drafter: Drafter,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    interrupt: threading.Event,
    timings: Timings,
) -> Generator[GeneratedToken, None, FinishReason]:
    """Yield tokens of one row until a rule ends the answer; the rule is the return value.

    The prompt is read from where the cache's first slot ends. The cache may then hold more tokens
    than were yielded, and the last of these need not be in it: whoever uses it again truncates it.
    Raises NumericalError.
    """
    clock = time.perf_counter
    begin = clock()
    encode(runtime, prompt, cache)
    _wait(runtime)
    timings.vision_seconds = clock() - begin
    begin = first = clock()
    logits = runtime.forward(rest_of(prompt, cache, runtime.device), cache)
    decoding = _Decoding(runtime, cache, sampler, drafter, max_new_tokens)
    for count, (token_id, row) in enumerate(decoding.tokens(logits), start=1):
        if count == 1:
            first = clock()
            timings.prefill_seconds = first - begin
            timings.time_to_first_token = first - timings.started
        else:
            timings.decode_seconds = clock() - first
            timings.tokens_per_second = (count - 1) / timings.decode_seconds
        if token_id == NOT_FINITE:
            raise NumericalError(
                f"the model produced NaN or infinite logits at token {count}; "
                "try --dtype float32, or check the weights"
            )
        is_stop = token_id in stop_ids
        yield GeneratedToken(token_id, is_stop, _logprob(row, token_id, sampler.params.logprobs))
        if is_stop:
            return "stop"
        if interrupt.is_set():
            return "interrupted"
    return "length"


def encode(runtime: Runtime, prompt: Prompt, cache: Cache) -> None:
    """Open the cache's first slot for `prompt`, and encode the pictures that it does not hold."""
    cache.begin(0, prompt)
    for media in prompt.unread(cache.lengths[0]):
        if not cache.has_media(media.content_hash):
            for _ in runtime.encode(media, cache):
                pass


def rest_of(prompt: Prompt, cache: Cache, device: torch.device) -> Batch:
    """The positions of `prompt` that the cache's first slot does not hold."""
    import torch

    start = cache.lengths[0]
    return Batch.last_of(torch.tensor(prompt.token_ids[start:], device=device), start)


class _Decoding:
    """Goes from token to token: reads tokens into the cache and samples the next.

    On a device that works by itself the next step is queued before the token that it reads is
    known here, so the device never waits for the host. A stop then costs a step that nobody needs.
    """

    def __init__(
        self, runtime: Runtime, cache: Cache, sampler: Sampler, drafter: Drafter, limit: int
    ) -> None:
        self._runtime = runtime
        self._cache = cache
        self._sampler = sampler
        self._drafter = drafter
        self._left = limit
        # log-probabilities are read from the device, which waits for all that is queued
        self._runs_ahead = is_asynchronous(runtime.device) and not sampler.params.logprobs
        self._last_arrival: float | None = None

    def tokens(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Pairs of a token's id and the logits [1, V] it was sampled from, until the limit."""
        token = self._sampler.sample(logits)
        while True:
            arriving = HostCopy(token)
            upcoming = self._step(token.clamp(min=0)) if self._may_run_ahead() else None
            token_id = arriving.read()
            self._time_arrival(runs_ahead=upcoming is not None)
            self._drafter.append(token_id)
            yield token_id, logits
            self._left -= 1
            if not self._left:
                return
            if upcoming is None:
                accepted, upcoming = self._read_on(token)
                for known, row in accepted:
                    self._drafter.append(known)
                    yield known, row
                    self._left -= 1
            token, logits = upcoming

    def _may_run_ahead(self) -> bool:
        """Not past the end, and not where a draft may follow: that needs the token's id first."""
        return self._runs_ahead and self._left > 1 and not self._drafter.draft(1)

    def _step(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Read token: [1, 1]; the next token and its logits."""
        batch = Batch.last_of(token[0], self._cache.lengths[0])
        logits = self._runtime.forward(batch, self._cache)
        return self._sampler.sample(logits), logits

    def _read_on(self, token: Tensor) -> tuple[list[tuple[int, Tensor]], tuple[Tensor, Tensor]]:
        """Read a token and a draft after it: the drafted tokens that are right, and one more."""
        begin = time.perf_counter()
        draft = self._drafter.draft(self._left - 1)
        if not draft:
            upcoming = self._step(token)
            int(upcoming[0])  # wait for it
            self._drafter.stepped(time.perf_counter() - begin)
            return [], upcoming
        start = self._cache.lengths[0]
        batch = Batch.all_of(_followed_by(token, draft), start)
        rows = self._runtime.forward(batch, self._cache)
        accepted: list[tuple[int, Tensor]] = []
        while True:
            row = rows[len(accepted), None]
            token = self._sampler.sample(row)
            if len(accepted) == len(draft) or int(token) != draft[len(accepted)]:
                break
            accepted.append((draft[len(accepted)], row))
        if len(accepted) < len(draft):
            self._cache.truncate(0, start + 1 + len(accepted))
        self._drafter.verified(len(draft), len(accepted), time.perf_counter() - begin)
        return accepted, (token, row)

    def _time_arrival(self, *, runs_ahead: bool) -> None:
        """Between two tokens that came while the device was busy lies one step."""
        now = time.perf_counter() if runs_ahead else None
        if now and self._last_arrival:
            self._drafter.stepped(now - self._last_arrival)
        self._last_arrival = now


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
            self._token = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._token.copy_(token, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(token.device))

    def read(self) -> int:
        """Wait for the token."""
        if self._arrival:
            self._arrival.synchronize()
        return int(self._token)


def _followed_by(token: Tensor, draft: list[int]) -> Tensor:
    """token: [1, 1] -> [1 + S]."""
    import torch

    return torch.cat((token[0], torch.tensor(draft, device=token.device)))


def _wait(runtime: Runtime) -> None:
    """Let queued work finish, so that it is timed under its own name."""
    if runtime.device.type == "cuda":
        import torch

        torch.cuda.synchronize(runtime.device)


def _logprob(logits: Tensor, token_id: int, count: int) -> TokenLogprob | None:
    if not count:
        return None
    scores = logits[0].log_softmax(-1)
    top = scores.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token_id, float(scores[token_id]), tuple(pairs))
