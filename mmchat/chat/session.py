"""A conversation with a model, as a stream of small typed events."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from mmchat import limits
from mmchat.conversation import Conversation, Image, Message, Turn, called, edited, question
from mmchat.engine.events import Event, Finished, Progress, Timings
from mmchat.engine.request import Answer
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import PromptError, UsageError, check_type, quoted
from mmchat.hardware.allocation import memory_error
from mmchat.leads import OF_SEND, with_leads
from mmchat.words import TEXT_ALONE

if TYPE_CHECKING:
    from mmchat.explain.look import Look
    from mmchat.loading.loader import LoadedModel
    from mmchat.models.prompt import Processor, Prompt

T = TypeVar("T")
_OVERTAKEN = "another question was asked before this answer was read"
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

    What it already holds is not read again, nor any picture: that is the engine's, which all
    conversations with one model share. One answer is written at a time; only `interrupt` is safe
    from other threads.

    loaded: the model, or what gives it when it is first needed.
    """

    def __init__(
        self, loaded: LoadedModel | Callable[[], LoadedModel], system: str | None = None
    ) -> None:
        if not hasattr(loaded, "runtime") and not callable(loaded):
            raise UsageError(f"a chat needs a model of mmchat.load, not {type(loaded).__name__}")
        check_type("system", system, (str, NoneType), "a string")
        self._loaded = loaded
        self.conversation = Conversation(system or None)
        self._interrupt = threading.Event()
        self._answering: Answer | None = None
        self._answered: tuple[Turn, LoadedModel] | None = None  # which model, where it is known

    @property
    def loaded(self) -> LoadedModel:
        """The model that answers."""
        if callable(self._loaded):
            self._loaded = self._loaded()
        return self._loaded

    @loaded.setter
    def loaded(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    @property
    def messages(self) -> list[Message]:
        """What was said so far; assign a list to continue from there."""
        return self.conversation.messages

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        self.conversation = Conversation.of(messages)

    @with_leads(OF_SEND)
    def send(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
        *,
        schema: Any = None,
        image_tags: bool = False,
    ) -> Iterator[Event]:
        """Ask, and read the answer as it is written.

        Pictures go before the text, or where its tags are if the model's family has one: `<image>`.

        images: one or a list of what mmchat.load_image takes, or of mmchat.Image. schema: in place
        of that of `sampling`. image_tags: what the text names in tags is opened, `<img>URL</img>`;
        only for text that is nobody else's. Reading raises UsageError, ImageError, NetworkError,
        PromptError, ContextLengthExceeded, MemoryError_, NumericalError; with a schema SchemaError
        and MissingExtra.
        """
        self._interrupt.clear()

        def events() -> Iterator[Event]:
            held = sampling
            if schema is not None:
                _check_sampling(sampling)
                held = replace(sampling or self.loaded.sampling_defaults, schema=schema)
            beside = self.conversation.images
            message = user_message(self.loaded, text, images, beside, image_tags=image_tags)
            yield from self._turn(message, held)

        return events()

    def ask(self, message: Message, sampling: SamplingParams | None = None) -> Iterator[Event]:
        """`send` of a message whose pictures stand where they should."""
        self._interrupt.clear()
        return self._turn(message, sampling)

    def retry(self, sampling: SamplingParams | None = None) -> Iterator[Event]:
        """Answer the last question again; the old answer stays until the new one is complete."""
        return self.edit(self.last_turn().question, sampling)

    def edit(
        self, message: str | Message, sampling: SamplingParams | None = None
    ) -> Iterator[Event]:
        """Ask `message` in place of the last question, whose pictures a text keeps."""
        old = self.last_turn().question
        self._interrupt.clear()

        def events() -> Iterator[Event]:
            asked = message
            if isinstance(asked, str):
                processor = self.loaded.processor
                asked = edited(old, asked, tag=processor.image_tag, names=processor.name_tags)
            yield from self._turn(asked, sampling, replaces=True)

        return events()

    def undo(self) -> Turn:
        """Take back the last question and its answer. Raises UsageError if there is none."""
        turn = self.last_turn()
        self.conversation = self.conversation.without_last()
        return turn

    @with_leads(OF_SEND)
    def complete(
        self,
        text: str | Message,
        images: ImageSource | Sequence[ImageSource] = (),
        sampling: SamplingParams | None = None,
        *,
        image_tags: bool = False,
    ) -> Iterator[Event]:
        """Continue raw text, without the chat format and without history.

        text: or a message whose pictures stand where they should. image_tags: as of `send`.
        """
        self._interrupt.clear()

        def events() -> Iterator[Event]:
            if isinstance(text, Message):
                message = text
                check_message(self.loaded, message)
            else:
                message = user_message(self.loaded, text, images, image_tags=image_tags)
            yield (yield from self._answer(lambda: self.loaded.processor.raw(message), sampling))

        return events()

    def interrupt(self) -> None:
        """End the answer that is being written before its next token; safe from any thread."""
        self._interrupt.set()
        if self._answering is not None:
            self._answering.cancel()

    def look(self) -> Look:
        """Where the last answer looked, word by word: in the model that gave it, if that is known.

        Raises UsageError for models that do not tell and questions without pictures, and what
        asking raises.
        """
        from mmchat.explain.look import look

        turn = self.last_turn()
        before = [*self.conversation.without_last().messages, turn.question]
        loaded = self.loaded
        if self._answered is not None and self._answered[0] is turn:
            loaded = self._answered[1]
        prompt = loaded.processor.chat(before)
        return look(loaded, prompt, self.conversation.images, turn.answer)

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

    def last_turn(self) -> Turn:
        """The last question and its answer. Raises UsageError if there is none."""
        if not self.conversation.turns:
            raise UsageError("nothing has been asked yet")
        return self.conversation.turns[-1]

    def _turn(
        self, message: Message, sampling: SamplingParams | None, *, replaces: bool = False
    ) -> Iterator[Event]:
        """Answer `message`, in place of the last question or after it.

        The conversation changes when that is complete.
        """
        check_message(self.loaded, message)
        begun = self.conversation
        before = begun.without_last() if replaces else begun
        history, loaded = [*before.messages, message], self.loaded
        finished = yield from self._answer(lambda: self.loaded.processor.chat(history), sampling)
        if self.conversation is not begun:
            raise UsageError(_OVERTAKEN)
        if finished.text or finished.reason != "interrupted":
            turn = Turn(message, finished.text, finished.reason)
            self.conversation, self._answered = before.plus(turn), (turn, loaded)
        yield finished

    def _answer(
        self, make_prompt: Callable[[], Prompt], sampling: SamplingParams | None
    ) -> Generator[Event, None, Finished]:
        """Yield the events of one answer; return the last one."""
        from mmchat.engine.driver import run

        _check_sampling(sampling)
        params = sampling or self.loaded.sampling_defaults
        timings = Timings(load_seconds=self.loaded.load_seconds)
        yield Progress("preprocessing")
        prompt = self._within_memory(make_prompt)
        timings.preprocessing_seconds = time.perf_counter() - timings.started
        request, engine = self.loaded.request(prompt, params, timings), self.loaded.engine
        if self._answering is not None:  # its reader has stopped in the middle
            engine.cancel(self._answering)
        self._answering = answer = engine.submit(request)
        if self._interrupt.is_set():  # before there was an answer to cancel
            answer.cancel()
        for _, event in run(engine, [answer]):
            if answer is not self._answering:
                raise UsageError(_OVERTAKEN)
            if isinstance(event, Finished):
                return event
            yield event
        raise RuntimeError("the engine ended without a Finished event")

    def _within_memory(self, make: Callable[[], T]) -> T:
        """Raises MemoryError_ where memory runs out, which holds nothing of the failed call."""
        try:
            return make()
        except Exception as error:
            out_of_memory = memory_error(error)
            if out_of_memory is None:
                raise
        self.loaded.engine.release()
        try:
            raise out_of_memory
        finally:
            del out_of_memory  # it would hold this frame, which would hold it


def user_message(
    loaded: LoadedModel,
    text: str,
    images: ImageSource | Sequence[ImageSource] = (),
    beside: Sequence[Image] = (),
    *,
    image_tags: bool = False,
) -> Message:
    """A question with its pictures before it, or where its tags are, one for each.

    beside: other pictures of the conversation. image_tags: as of ChatSession.send. Raises
    UsageError, ImageError, NetworkError, PromptError.
    """
    from mmchat.images import load_images

    check_type("text", text, str, "a string")
    images = _listed(images)
    _check_vision(loaded, images)
    pictures = load_images(images, alpha=loaded.processor.alpha, beside=list(beside))
    opened = {}
    if image_tags:
        opened = open_named(loaded.processor, text, pictures, beside)
        _check_vision(loaded, list(opened))
    tag, names = loaded.processor.image_tag, loaded.processor.name_tags
    return question(text, pictures, tag=tag, names=names, opened=opened)


def open_named(
    processor: Processor, text: str, images: Sequence[Image], beside: Sequence[Image] = ()
) -> dict[str, Image]:
    """Open what a text names in tags and is none of `images`; by its name.

    Only for text of the user's own: a document could have files read and addresses fetched. Raises
    UsageError, ImageError, NetworkError, PromptError.
    """
    from mmchat.images import load_each

    if processor.name_tags is None:
        raise UsageError(
            "prompts of this model name no pictures, so that a text cannot open them; give them"
            " beside the text"
        )
    given = called(images)
    names = dict.fromkeys(processor.name_tags.split(text)[1::2])
    wanted = [name for name in names if name not in given]
    have = len(images) + len(wanted)
    if have > limits.IMAGES_PER_PROMPT:
        raise PromptError(
            f"the prompt has {have} pictures; at most {limits.IMAGES_PER_PROMPT} are possible"
        )
    each = load_each(wanted, alpha=processor.alpha, beside=[*beside, *images])
    for name, pages in zip(wanted, each, strict=True):
        if len(pages) > 1:
            raise PromptError(f"{quoted(name, 200)} has {len(pages)} pages; name one: {name}#1")
    return {name: pages[0] for name, pages in zip(wanted, each, strict=True)}


def check_message(loaded: LoadedModel, message: Message) -> None:
    """Raises UsageError if this is no message, or has pictures that the model does not take."""
    check_type("message", message, Message, "a Message")
    _check_vision(loaded, message.images)


def _check_sampling(sampling: object) -> None:
    check_type("sampling", sampling, (SamplingParams, NoneType), "a SamplingParams")


def _check_vision(loaded: LoadedModel, images: Sequence[object]) -> None:
    if images and loaded.options.text_only:
        if loaded.spec.text_only:
            raise UsageError(TEXT_ALONE)
        raise UsageError("the model was loaded for text only; load it again without text_only")


def _listed(images: Any) -> list[ImageSource]:
    """The pictures of `images`, which may be one: a string is one, and not its letters."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
