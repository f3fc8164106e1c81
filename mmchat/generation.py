"""The prefill and decode loop: prompt in, tokens out, with stop rules and timings."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmchat.errors import NumericalError
from mmchat.events import FinishReason, Timings, TokenLogprob
from mmchat.sampling import NOT_FINITE, Sampler
from mmchat.tokenizers.base import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from mmchat.models.base import Cache, ModelInputs
    from mmchat.runtime.base import Runtime


@dataclass(frozen=True)
class GeneratedToken:
    """A sampled token; `is_stop` ones end the answer and have no text."""

    token_id: int
    is_stop: bool
    logprob: TokenLogprob | None = None


def generate_tokens(
    runtime: Runtime,
    inputs: ModelInputs,
    cache: Cache,
    sampler: Sampler,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    interrupt: threading.Event,
    timings: Timings,
) -> Generator[GeneratedToken, None, FinishReason]:
    """Yield tokens of one row until a rule ends the answer; the rule is the return value.

    The last token that is yielded has not been read by the model. Raises NumericalError.
    """
    clock = time.perf_counter
    begin = clock()
    runtime.encode_images(inputs, cache)
    _wait(runtime)
    timings.vision_seconds = clock() - begin
    begin = first = clock()
    logits = runtime.prefill(inputs, cache)
    for count in range(1, max_new_tokens + 1):
        token = sampler.sample(logits)
        token_id = int(token)
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
        yield GeneratedToken(token_id, is_stop, _logprob(logits, token_id, sampler.params.logprobs))
        if is_stop:
            return "stop"
        if interrupt.is_set():
            return "interrupted"
        if count < max_new_tokens:
            logits = runtime.decode(token, cache)
    return "length"


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


class AnswerText:
    """Token ids in, text out: never half a character, never part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; may be empty."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """What was held back, once no more tokens follow."""
        text = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
