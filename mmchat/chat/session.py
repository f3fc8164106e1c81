"""A conversation with a model, as a stream of small typed events."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any

from mmchat.conversation import Conversation, Image, Message, Text, Turn
from mmchat.engine.drafts import Drafter, Pace
from mmchat.engine.events import (
    Event,
    Finished,
    Progress,
    Timings,
    Usage,
)
from mmchat.engine.generation import generate_tokens
from mmchat.engine.sampling import Sampler, SamplingParams
from mmchat.engine.text import AnswerText, stream_text
from mmchat.errors import ContextLengthExceeded, UsageError, check_type
from mmchat.hardware.allocation import memory_error
from mmchat.models.base import common_prefix

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import Prompt

INITIAL_CAPACITY = 256  # positions beyond the prompt; the cache grows when they are used

# What `images` takes, one or several of them: a path, address or `data:` URL, bytes, a file, and
# pictures in memory (mmchat.Image, Pillow, numpy, torch).
ImageSource = Any


@dataclass(frozen=True)
class Budget:
    """Positions of the context that a prompt takes, of `limit`."""

    used: int
    limit: int


class ChatSession:
    """A conversation. A turn that fails, or says nothing, leaves it as it was.

    Keys and values of what the conversation already holds are kept between turns, and so is every
    encoded picture. One answer is written at a time; only `interrupt` is safe from other threads.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None) -> None:
        if not hasattr(loaded, "runtime"):
            raise UsageError(f"a chat needs a model of mmchat.load, not {type(loaded).__name__}")
        check_type("system", system, (str, NoneType), "a string")
        self.loaded = loaded
        self.conversation = Conversation(system or None)
        self._interrupt = threading.Event()
        self._cache = loaded.runtime.new_cache(1, INITIAL_CAPACITY)
        self._cached: list[int | str] = []  # fingerprint of the positions in the cache
        self._pace = Pace()

    @property
    def messages(self) -> list[Message]:
        """What was said so far; assign a list to continue from there."""
        return self.conversation.messages

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        self.conversation = Conversation.of(messages)

    def send(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """Ask, and read the answer as it is written. Pictures go before the text.

        images: one or a list of what mmchat.load_image takes, or of mmchat.Image. Reading raises
        UsageError, ImageError, NetworkError, PromptError, ContextLengthExceeded, MemoryError_,
        NumericalError.
        """
        self._interrupt.clear()
        return self._send(text, images, sampling)

    def ask(self, message: Message, sampling: SamplingParams | None = None) -> Iterator[Event]:
        """`send` of a message whose pictures stand where they should."""
        self._interrupt.clear()
        return self._turn(self.conversation, message, sampling)

    def retry(self, sampling: SamplingParams | None = None) -> Iterator[Event]:
        """Answer the last question again; the old answer stays until the new one is complete."""
        return self.edit(self._last_turn().question, sampling)

    def edit(self, message: Message, sampling: SamplingParams | None = None) -> Iterator[Event]:
        """Ask `message` in place of the last question."""
        self._last_turn()
        self._interrupt.clear()
        return self._turn(self.conversation.without_last(), message, sampling)

    def undo(self) -> Turn:
        """Take back the last question and its answer. Raises UsageError if there is none."""
        turn = self._last_turn()
        self.conversation = self.conversation.without_last()
        return turn

    def complete(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
    ) -> Iterator[Event]:
        """Continue raw text, without the chat format and without history."""
        self._interrupt.clear()
        return self._complete(text, images, sampling)

    def interrupt(self) -> None:
        """End the answer that is being written after its next token; safe from any thread."""
        self._interrupt.set()

    def reset(self) -> None:
        """Forget the conversation but for the system prompt; encoded pictures stay."""
        self.conversation = Conversation(self.conversation.system)

    def budget(self, message: Message | None = None) -> Budget:
        """What the conversation, and `message` after it, take of the context."""
        check_type("message", message, (Message, NoneType), "a Message")
        messages = self.messages + ([message] if message else [])
        used = 0
        if messages:
            used = len(self.loaded.processor.chat(messages).token_ids)
        return Budget(used, self.loaded.max_seq_len)

    def turns_over_budget(self, message: Message, room: int = 1) -> int | None:
        """How many of the oldest turns must go so that `message` leaves `room` for its answer.

        None if it does not fit even alone.
        """
        check_type("message", message, Message, "a Message")
        chat = self.conversation

        def fits(count: int) -> bool:
            messages = [*chat.without_first(count).messages, message]
            used = len(self.loaded.processor.chat(messages).token_ids)
            return used + room <= self.loaded.max_seq_len

        counts = range(len(chat.turns) + 1)
        count = bisect_left(counts, True, key=fits)
        return count if count in counts else None

    def _last_turn(self) -> Turn:
        if not self.conversation.turns:
            raise UsageError("nothing has been asked yet")
        return self.conversation.turns[-1]

    def _send(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource],
        sampling: SamplingParams | None,
    ) -> Iterator[Event]:
        message = self._user_message(text, images, self.conversation.images)
        yield from self._turn(self.conversation, message, sampling)

    def _turn(
        self, before: Conversation, message: Message, sampling: SamplingParams | None
    ) -> Iterator[Event]:
        """Answer `message` after `before`; the conversation changes when the answer is complete."""
        check_type("message", message, Message, "a Message")
        if message.images and self.loaded.options.text_only:
            raise UsageError("the model was loaded for text only; load it again without text_only")
        history = [*before.messages, message]
        finished = yield from self._answer(lambda: self.loaded.processor.chat(history), sampling)
        if finished.text or finished.reason != "interrupted":
            self.conversation = before.plus(Turn(message, finished.text, finished.reason))
        yield finished

    def _complete(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource],
        sampling: SamplingParams | None,
    ) -> Iterator[Event]:
        message = self._user_message(text, images, [])
        yield (yield from self._answer(lambda: self.loaded.processor.raw(message), sampling))

    def _user_message(
        self, text: str, images: ImageSource | Sequence[ImageSource], beside: list[Image]
    ) -> Message:
        from mmchat.images import load_images

        check_type("text", text, str, "a string")
        images = _listed(images)
        if images and self.loaded.options.text_only:
            raise UsageError("the model was loaded for text only; load it again without text_only")
        loaded = load_images(images, alpha=self.loaded.processor.alpha, beside=beside)
        return Message("user", (*loaded, Text(text)))

    def _answer(
        self, make_prompt: Callable[[], Prompt], sampling: SamplingParams | None
    ) -> Generator[Event, None, Finished]:
        """Yield the events of one answer; return the last one.

        A failure, or a reader that stops, leaves in the cache what it shared with the prompt.
        """
        check_type("sampling", sampling, (SamplingParams, NoneType), "a SamplingParams")
        params = sampling or self.loaded.sampling_defaults
        timings = Timings(load_seconds=self.loaded.load_seconds)
        try:
            yield Progress("preprocessing")
            prompt = make_prompt()
            timings.preprocessing_seconds = time.perf_counter() - timings.started
            room = self._room(len(prompt.token_ids))
            params = replace(params, max_new_tokens=min(params.max_new_tokens, room))
            return (yield from self._run(prompt, params, timings))
        except BaseException as error:
            self._cache.truncate(0, len(self._cached))
            out_of_memory = memory_error(error)
            if out_of_memory is None:
                raise
        # After the handler nothing holds what the failed call had allocated.
        self._release_memory()
        try:
            raise out_of_memory
        finally:
            del out_of_memory  # it would hold this frame, which would hold it

    def _release_memory(self) -> None:
        try:
            self._cache.release()
        except (MemoryError, RuntimeError) as error:
            if memory_error(error) is None:
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
        self, prompt: Prompt, params: SamplingParams, timings: Timings
    ) -> Generator[Event, None, Finished]:
        loaded = self.loaded
        # The last position is read again even if it is cached: its logits are needed.
        start = min(common_prefix(self._cached, prompt.fingerprint), len(prompt.token_ids) - 1)
        self._cache.truncate(0, start)
        self._cached = self._cached[:start]
        sampler = Sampler(params, list(prompt.token_ids), loaded.vocab_size, loaded.runtime.device)
        drafter = Drafter(
            prompt.token_ids,
            params.speculate,
            self._pace,
            stop_ids=loaded.processor.stop_ids,
            vocab_size=loaded.vocab_size,
        )
        yield Progress("vision" if prompt.media else "prefill")
        tokens = generate_tokens(
            loaded.runtime,
            prompt,
            self._cache,
            sampler,
            drafter,
            stop_ids=loaded.processor.stop_ids,
            max_new_tokens=params.max_new_tokens,
            interrupt=self._interrupt,
            timings=timings,
        )
        answer = yield from stream_text(tokens, AnswerText(loaded.tokenizer, params.stop))
        self._cached = [*prompt.fingerprint, *answer.ids[:-1]]  # the last one may be unread
        self._cache.truncate(0, len(self._cached))
        timings.peak_memory_bytes = loaded.peak_memory()
        usage = Usage(
            prompt_tokens=len(prompt.token_ids),
            cached_tokens=start,
            completion_tokens=len(answer.ids),
            image_count=len(prompt.media),
            image_tokens=sum(placed.media.facts.tokens for placed in prompt.media),
        )
        return Finished(
            answer.reason,
            "".join(answer.pieces),
            usage,
            timings,
            prompt.token_ids,
            tuple(answer.ids),
            tuple(answer.logprobs),
            sampler.seed,
            tuple(placed.media.facts for placed in prompt.media),
        )


def _listed(images: Any) -> list[ImageSource]:
    """The pictures of `images`, which may be one: a string is one, and not its letters."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
