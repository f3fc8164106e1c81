"""The Python interface: `mmchat.load(...)` gives a Model to chat with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, overload

from mmchat.catalog.source import ModelSource
from mmchat.chat.session import ChatSession, ImageSource, check_message, user_message
from mmchat.conversation import Message
from mmchat.engine.driver import Talk, hold
from mmchat.engine.events import Finished, read_events
from mmchat.engine.room import CPU_ROWS
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import MmchatError, UsageError, check_type, quoted
from mmchat.leads import OF_ASK, with_leads
from mmchat.limits import MOST_ROWS
from mmchat.loading import loader
from mmchat.loading.options import LoadOptions, called_with

Question = str | tuple[str, ImageSource | Sequence[ImageSource]] | Message


@dataclass(frozen=True)
class Model(loader.LoadedModel):
    """A loaded model to talk to."""

    def __repr__(self) -> str:
        scheme = "" if self.options.quantize == "none" else f", {self.options.quantize}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"<mmchat.Model {self.spec.name}: {self.device}, {dtype}{scheme},"
            f" context {self.max_seq_len}>"
        )

    @with_leads(OF_ASK)
    def ask(
        self,
        question: str | list[Message | dict[str, Any]] | dict[str, Any],
        *pictures: ImageSource,
        sampling: SamplingParams | None = None,
        schema: Any = None,
        image_tags: bool = False,
    ) -> str:
        """The whole answer to a question about pictures, or about none. Nothing is kept of it.

        question: a text; or messages as OpenAI's chat takes them, `{"role", "content"}`, whose
        pictures are parts with an image_url; or a dictionary with such `messages` and settings
        beside them. schema: the answer is JSON that obeys it, as SamplingParams says. image_tags:
        pictures that a text names in tags are opened, as `ChatSession.send` says, which tells also
        what is raised.
        """
        from mmchat.chat import foreign

        if schema is not None:
            sampling = replace(sampling or self.sampling_defaults, schema=schema)
        session = self.chat()
        if isinstance(question, str):
            events = session.send(question, list(pictures), sampling, image_tags=image_tags)
        else:
            if image_tags:
                raise UsageError("image_tags is for a text; messages hold their pictures")
            if pictures:
                raise UsageError("pictures of messages stand in them, as parts with an image_url")
            if isinstance(question, dict):
                defaults = sampling or self.sampling_defaults
                question, sampling = foreign.as_request(question, defaults)
            check_type("question", question, (list, tuple), "a text, messages or a dictionary")
            processor = self.processor
            *before, last = foreign.as_messages([*question], processor.alpha, processor.image_tag)
            if last.role != "user":
                raise UsageError(f"the last message must be of the role user, not {last.role}")
            session.messages = before
            events = session.ask(last, sampling)
        return read_events(events).text

    def chat(self, system: str | None = None) -> ChatSession:
        """Begin a conversation."""
        return ChatSession(self, system)

    @overload
    def generate_many(
        self,
        questions: Iterable[Question],
        sampling: SamplingParams | None = None,
        *,
        rows: int = CPU_ROWS,
        return_exceptions: Literal[False] = False,
        image_tags: bool = False,
        urls: Iterable[ImageSource | Sequence[ImageSource]] | None = None,
    ) -> Iterator[Finished]: ...

    @overload
    def generate_many(
        self,
        questions: Iterable[Question],
        sampling: SamplingParams | None = None,
        *,
        rows: int = CPU_ROWS,
        return_exceptions: bool,
        image_tags: bool = False,
        urls: Iterable[ImageSource | Sequence[ImageSource]] | None = None,
    ) -> Iterator[Finished | MmchatError]: ...

    def generate_many(
        self,
        questions: Iterable[Question],
        sampling: SamplingParams | None = None,
        *,
        rows: int = CPU_ROWS,
        return_exceptions: bool = False,
        image_tags: bool = False,
        urls: Iterable[ImageSource | Sequence[ImageSource]] | None = None,
    ) -> Iterator[Finished | MmchatError]:
        """Answer each question in a conversation of its own, `rows` of them at once, in order.

        A question is a text, a text and its pictures as `ChatSession.send` takes them, or a
        Message. Pictures are opened when it is their turn. Exported programs answer one at a time.
        Reading raises what `send` does, for the first question that fails; return_exceptions: its
        error stands in the place of its answer, and the others are answered. image_tags: as of
        `ChatSession.send`. urls: the pictures of each question, where these are texts alone.
        """
        params = sampling or self.sampling_defaults
        _check_several("questions", questions)
        check_type("rows", rows, int, "a whole number")
        check_type("return_exceptions", return_exceptions, bool, "True or False")
        if not 1 <= rows <= MOST_ROWS:
            raise UsageError(f"rows must be between 1 and {MOST_ROWS}, not {rows}")

        def talk(question: Question) -> Talk[Finished | MmchatError]:
            try:
                if isinstance(question, Message):
                    check_message(self, question)
                    message = question
                else:
                    text, pictures = _text_and_pictures(question)
                    message = user_message(self, text, pictures, image_tags=image_tags)
                return (yield self.request(self.processor.chat([message]), params))
            except MmchatError as error:
                if not return_exceptions:
                    raise
                return error.with_traceback(None)  # which would hold the pictures

        if urls is not None:
            _check_several("urls", urls)
        each = questions if urls is None else _with_pictures(questions, urls)
        return hold(self.engine_of(rows), map(talk, each))


def _check_several(name: str, given: object) -> None:
    """Raises UsageError for a text, whose letters would be asked one by one, and for one thing."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        what = f"not {type(given).__name__} {quoted(given)}"
        raise UsageError(f"{name} must be a list, or something else to go through, {what}")


def _text_and_pictures(question: Any) -> tuple[Any, Any]:
    """Raises UsageError for a tuple that is not of two; who is given them looks at the rest."""
    if not isinstance(question, tuple):
        return question, ()
    if len(question) != 2:
        raise UsageError(
            f"a question of {len(question)} parts; give a text and its pictures, of which several"
            ' are a list: ("What changed?", ["before.jpg", "after.jpg"])'
        )
    return question


def _with_pictures(
    questions: Iterable[Question], urls: Iterable[ImageSource | Sequence[ImageSource]]
) -> Iterator[Question]:
    """Raises UsageError where there is one without the other."""
    for number, (text, pictures) in enumerate(zip_longest(questions, urls), start=1):
        if not isinstance(text, str) or pictures is None:
            raise UsageError(
                f"question {number}: with urls each question is a text, and has its own list of"
                " them, perhaps empty"
            )
        yield text, pictures


def load_model(options: LoadOptions, source: ModelSource | None = None) -> Model:
    """`loader.load`, for a conversation."""
    return Model(**vars(loader.load(options, source)))


@called_with(LoadOptions)
def load(options: LoadOptions) -> Model:
    """Load a model by name, Hub id or folder; without any, the built-in one.

    Errors are those of mmchat.loading.loader.load.
    """
    return load_model(options)
