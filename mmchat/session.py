"""A conversation with a model, as a stream of small typed events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmchat.errors import ContextLengthExceeded, UsageError
from mmchat.events import (
    Event,
    Finished,
    FinishReason,
    Progress,
    TextDelta,
    Timings,
    TokenLogprob,
    Usage,
)
from mmchat.generation import AnswerText, generate_tokens
from mmchat.messages import Image, Message, Text
from mmchat.models.base import common_prefix
from mmchat.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from mmchat.loader import LoadedModel

INITIAL_CAPACITY = 256  # positions beyond the prompt; the cache grows when they are used


ImageSource = Image | str | Path | bytes


class ChatSession:
    """A conversation. A turn that fails leaves it as it was.

    Keys and values of what the conversation already holds are kept between turns, and so is every
    encoded picture.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None) -> None:
        self.loaded = loaded
        self.messages: list[Message] = []
        if system:
            self.messages.append(Message("system", (Text(system),)))
        self._interrupt = threading.Event()
        self._cache = loaded.runtime.new_cache(1, INITIAL_CAPACITY)
        self._cached: list[int | str] = []  # fingerprint of the positions in the cache

    def send(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """Ask, and read the answer as it is written. Pictures go before the text.

        Raises ImageError, PromptError, ContextLengthExceeded, MemoryError_, NumericalError.
        """
        message = self._user_message(text, images)
        history = [*self.messages, message]
        finished = yield from self._answer(
            lambda: self.loaded.processor.chat_prompt(history), sampling
        )
        self.messages += [message, Message("assistant", (Text(finished.text),))]
        yield finished

    def complete(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """Continue raw text, without the chat format and without history."""
        message = self._user_message(text, images)
        yield (yield from self._answer(lambda: self.loaded.processor.raw_prompt(message), sampling))

    def interrupt(self) -> None:
        """End the answer that is being written after its next token; safe from any thread."""
        self._interrupt.set()

    def reset(self) -> None:
        """Forget the conversation but for the system prompt; encoded pictures stay."""
        self.messages = [m for m in self.messages if m.role == "system"]

    def _user_message(self, text: str, images: Sequence[ImageSource]) -> Message:
        from mmchat.images import load_image

        if images and self.loaded.text_only:
            raise UsageError("the model was loaded for text only; load it again without text_only")
        alpha = self.loaded.processor.alpha
        loaded = [i if isinstance(i, Image) else load_image(i, alpha=alpha) for i in images]
        return Message("user", (*loaded, Text(text)))

    def _answer(
        self, make_prompt: Callable[[], Any], sampling: SamplingParams | None
    ) -> Generator[Event, None, Finished]:
        """Yield the events of one answer; return the last one."""
        params = sampling or self.loaded.sampling_defaults
        timings = Timings(load_seconds=self.loaded.load_seconds)
        self._interrupt.clear()
        yield Progress("preprocessing")
        prompt = make_prompt()
        timings.preprocessing_seconds = time.perf_counter() - timings.started
        room = self._room(len(prompt.input_ids))
        # The last position is read again even if it is cached: its logits are needed.
        start = min(common_prefix(self._cached, prompt.fingerprint), len(prompt.input_ids) - 1)
        params = replace(params, max_new_tokens=min(params.max_new_tokens, room))
        try:
            return (yield from self._run(prompt, start, params, timings))
        except BaseException:
            self._cache.reset()
            self._cached = []
            raise

    def _room(self, prompt_tokens: int) -> int:
        room = self.loaded.max_seq_len - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens and the context {self.loaded.max_seq_len}; "
                "shorten the prompt or raise --max-seq-len"
            )
        return room

    def _run(
        self, prompt: Any, start: int, params: SamplingParams, timings: Timings
    ) -> Generator[Event, None, Finished]:
        loaded = self.loaded
        self._cache.truncate(start)
        self._cached = list(prompt.fingerprint)
        inputs = loaded.processor.inputs(prompt, start)
        sampler = Sampler(params, list(prompt.input_ids), loaded.vocab_size, loaded.runtime.device)
        yield Progress("vision" if prompt.image_tokens else "prefill")
        tokens = generate_tokens(
            loaded.runtime,
            inputs,
            self._cache,
            sampler,
            stop_ids=loaded.processor.stop_ids,
            max_new_tokens=params.max_new_tokens,
            interrupt=self._interrupt,
            timings=timings,
        )
        answer = AnswerText(loaded.tokenizer, params.stop)
        pieces: list[str] = []
        output_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason = "length"
        while True:
            try:
                token = next(tokens)
            except StopIteration as end:
                reason = end.value
                break
            output_ids.append(token.token_id)
            if token.logprob:
                logprobs.append(token.logprob)
            piece = "" if token.is_stop else answer.push(token.token_id)
            pieces.append(piece)
            yield TextDelta(piece, token.token_id, token.logprob)
            if answer.stopped:
                reason = "stop_string"
                break
        tail = answer.flush()
        if tail:
            pieces.append(tail)
            yield TextDelta(tail, None)
        self._cached += output_ids[:-1]  # the last token has not been read
        timings.peak_memory_bytes = loaded.peak_memory()
        text = "".join(pieces)
        return Finished(
            reason,
            text,
            Usage(
                len(prompt.input_ids),
                start,
                len(output_ids),
                len(prompt.image_tokens),
                sum(prompt.image_tokens),
            ),
            timings,
            prompt.input_ids,
            tuple(output_ids),
            tuple(logprobs),
            sampler.seed,
            prompt.layouts,
            prompt.image_tokens,
        )
