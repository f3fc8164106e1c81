"""The chat without its terminal: what a line of input does to the session."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmchat.catalog.adapters import find_adapters
from mmchat.conversation import Conversation, Turn, edited, question
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import (
    ContextLengthExceeded,
    ImageError,
    MemoryError_,
    MmchatError,
    RankError,
    UsageError,
)
from mmchat.input_text import checked
from mmchat.repl import facts, paths, saving, settings
from mmchat.repl.chats import Keeper
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.chat.session import Budget, ChatSession
    from mmchat.conversation import Image, Message
    from mmchat.engine.events import Event, Finished
    from mmchat.loading.loader import LoadedModel
    from mmchat.repl.loading import LoadingModel
    from mmchat.repl.screen import PlainScreen
    from mmchat.repl.terminal_screen import TerminalScreen

ANSWER_ROOM = 128  # positions to leave for an answer when old turns have to go


class Leave(Exception):  # noqa: N818 - not an error
    """The user wants to go."""


class Chat:
    """A session with pictures attached for the next question, settings, and a screen.

    Every line either takes effect as a whole or leaves things as they were and says so.
    loading: the model, if it is not that of `session` already; what needs it waits.
    first_error: exit code of the first line that failed, 0 if none did.
    """

    def __init__(
        self,
        session: ChatSession,
        screen: PlainScreen | TerminalScreen,
        sampling: SamplingParams,
        chats: Path,
        *,
        saves: bool = False,
        loading: LoadingModel | None = None,
    ) -> None:
        self.session = session
        self.loading = loading
        self.screen = screen
        self.sampling = sampling
        self.attached: list[Image] = []
        self.image_tags = False  # whether a question may open the pictures that it names in tags
        self.last: Finished | None = None
        self.first_error = 0
        self.written: set[tuple[str, Path]] = set()  # kinds and files that commands wrote
        self.addresses: list[str] = []  # pictures from the network, for completion
        self.keeper = Keeper(chats, self.as_saved, screen.note, saves=saves)
        self._models: list[LoadedModel] = []  # as it was given, and perhaps without its adapters
        self._answered_with: tuple[Conversation, SamplingParams] | None = None
        self._budget: tuple[Conversation, Budget] | None = None

    @property
    def spec(self) -> ModelSpec:
        return self._known.spec

    @property
    def _known(self) -> LoadingModel | LoadedModel:
        """What need not be waited for."""
        return self.loading or self.session.loaded

    @property
    def is_loading(self) -> bool:
        """Whether what needs the model would have to wait."""
        return self.loading is not None and not self.loading.is_over

    def as_saved(self, chat: Conversation) -> saving.SavedChat:
        """`chat` with what else is saved of it: the model and the settings that were changed."""
        defaults = SamplingParams(**asdict(self.spec.generation))
        changed = settings.changed_from(defaults, self.sampling)
        return saving.SavedChat(chat, self.spec.name, changed)

    def budget(self) -> Budget:
        """Context in use; counted once per state of the conversation."""
        chat = self.session.conversation
        if self._budget is None or self._budget[0] is not chat:
            self._budget = chat, self.session.budget()
        return self._budget[1]

    def line(self, text: str) -> None:
        """Do what a line says. Raises Leave; errors are shown."""
        from mmchat.repl import commands

        try:
            text = checked(text, "the line")
            found = commands.find(text)
            if found is not None:
                command, argument = found
                command.run(self, argument)
            elif text.strip():
                if reason := paths.folder_named(text):
                    raise UsageError(f"{reason}; nothing was sent")
                self.take(paths.read_line(text))
        except MmchatError as error:
            has_model = self.loading is None or self.loading.error is None
            if isinstance(error, RankError) or not has_model:  # there is nothing to talk to
                raise
            self.fail(error)
        except KeyboardInterrupt:
            if not self.screen.interactive:
                raise
            self.screen.note("stopped")

    def use_adapter(self, wanted: bool | None) -> str:
        """Answer from now on with the adapters or without; says which. None: as before.

        Raises UsageError if there are none, MemoryError_ if the other model does not fit.
        """
        self._models = self._models or [self.session.loaded]
        merged = self._models[0]
        if not merged.adapters:
            raise UsageError("no adapter is merged; start with --adapter PATH|REPO")
        if wanted is False and len(self._models) == 1:
            from mmchat.loading.loader import load_with

            said = "loading what the adapter changed"
            model = self.screen.wait(said, lambda: load_with(merged, ()))
            self._models.append(model)
        if wanted is not None:
            self.session.loaded = self._models[0 if wanted else 1]
            self._answered_with = None
        with_it = self.session.loaded is merged
        names = ", ".join(paths.one_line(one.name) for one in find_adapters(merged.adapters))
        return f"answers come {'with' if with_it else 'without'} {names}; \\retry compares"

    def fail(self, error: MmchatError) -> None:
        self.first_error = self.first_error or error.exit_code
        self.screen.error(str(error))

    def take(self, found: paths.Found) -> None:
        """Attach what a text names and ask its question: both, or neither."""
        as_is = "nothing was sent (\\say TEXT sends as is)"
        if found.missing:
            raise UsageError(f"{facts.no_such(found.missing)}; {as_is}")
        before = list(self.attached)
        if found.sources:
            try:
                self.attach(found.sources)
            except (ImageError, MemoryError_) as error:
                raise type(error)(f"{error}; {as_is}") from None
        if found.mentioned:
            names = facts.some(found.mentioned)
            self.screen.note(f"without a picture: {names}; \\image PATH|URL attaches one")
        if not found.text:
            return
        try:
            self.ask(found.text)
        except BaseException:
            self.attached = before
            raise

    def say_notes(self) -> None:
        """What has been noted while the model was loaded."""
        while self.loading and self.loading.notes:
            self.screen.note(self.loading.notes.pop(0))

    def say_unasked(self) -> None:
        """Say that attached pictures are no part of what is saved, if there are any."""
        if count := len(self.attached):
            pictures = "1 picture was" if count == 1 else f"{count} pictures were"
            unsaved = "it is" if count == 1 else "they are"
            self.screen.note(f"{pictures} attached and not asked about; {unsaved} not saved")

    def attach(self, sources: Sequence[str]) -> None:
        """Load pictures for the next question: all of them or none. Raises ImageError, …"""
        loaded = self.load(sources, self.pictures())
        is_first, self.attached = not self.attached, self.attached + loaded
        for image in loaded:
            self.show_picture(image)
        sees_earlier = self.spec.family.describe(self.spec.config).sees_earlier
        if is_first and self.session.conversation.images and not sees_earlier:
            self.screen.note(facts.OUT_OF_SIGHT)

    def load(self, sources: Sequence[str], beside: Iterable[Image]) -> list[Image]:
        """Pictures by path, address or "clipboard", which the chat will hold beside others."""
        known = self._known.options
        if known.text_only:
            raise UsageError("the model was loaded with --text-only; start again without it")
        from mmchat.images import load_images
        from mmchat.images.clipboard import clipboard

        alpha = known.alpha or self.session.loaded.processor.alpha
        found = [clipboard() if source == paths.CLIPBOARD else source for source in sources]
        names = [None if isinstance(source, str) else paths.CLIPBOARD for source in found]
        one = paths.short_name(sources[0])
        what = one if len(sources) == 1 else f"{len(sources)} pictures"
        images = self.screen.wait(
            f"reading {what}",
            lambda: load_images(found, alpha=alpha, names=names, beside=beside),
        )
        for source in sources:
            if source.startswith(("http:", "https:")) and source not in self.addresses:
                self.addresses.append(source)
        return images

    def show_picture(self, image: Image, done: str = "attached") -> None:
        name = f"{done} {paths.short_name(image.source)}"
        self.screen.picture(image.pixels, name, facts.picture_facts(image, self.spec))

    def ask(self, text: str) -> None:
        """Send a message with the attached pictures."""
        processor, attached = self.session.loaded.processor, self.attached
        opened = self._opened(text)
        message = question(
            text,
            attached,
            marks=bool(attached),
            tag=self._tag(attached),
            names=processor.name_tags if attached or self.image_tags else None,
            opened=opened,
        )
        sampling = self.sampling
        asked = lambda: self.session.ask(message, sampling)  # noqa: E731
        if self._answered(asked, message, sampling, undone=0):
            self.attached = []

    def retry(self, sampling: SamplingParams | None = None) -> None:
        last = self.session.last_turn()
        sampling = sampling or self.sampling
        if self._is_same_again(sampling):
            self.screen.note(facts.same_again(sampling))
        self._answered(lambda: self.session.retry(sampling), last.question, sampling, undone=1)

    def _is_same_again(self, sampling: SamplingParams) -> bool:
        """Whether the last question, asked again, must get the answer that it has."""
        chat = self.session.conversation
        before = self._answered_with
        is_fixed = sampling.is_greedy or sampling.seed is not None
        same = before is not None and before[0] is chat and before[1] == sampling
        return is_fixed and same and chat.turns[-1].reason != "interrupted"

    def edit(self, text: str) -> None:
        """Ask `text` in place of the last question, with the same pictures."""
        old = self.session.last_turn().question
        names = self.session.loaded.processor.name_tags if old.images else None
        message = edited(old, checked(text, "the line"), tag=self._tag(old.images), names=names)
        sampling = self.sampling
        self._answered(lambda: self.session.edit(message, sampling), message, sampling, undone=1)

    def _opened(self, text: str) -> dict[str, Image]:
        """The pictures that a question names in tags, where it may open them."""
        if not self.image_tags:
            return {}
        from mmchat.chat.session import open_named

        processor = self.session.loaded.processor
        return open_named(processor, text, self.attached, self.pictures())

    def _tag(self, images: Sequence[Image]) -> str:
        """Where nothing is attached, nobody means a picture by it."""
        return self.session.loaded.processor.image_tag if images else ""

    def _answered(
        self,
        events: Callable[[], Iterator[Event]],
        message: Message,
        sampling: SamplingParams,
        *,
        undone: int,
    ) -> bool:
        """Write an answer; offers to drop old turns if the context is full. True if it was kept."""
        _ = self.session.loaded  # waited for here, where that can be seen
        try:
            return self._answer(events(), message, sampling, undone)
        except ContextLengthExceeded as error:
            count = self._turns_to_drop(message, undone)
            if not count:
                raise
            turns = f"the {count} oldest turns" if count > 1 else "the oldest turn"
            turns += facts.with_pictures(self.session.conversation.turns[:count])
            self.screen.error(str(error))
            if not self.screen.confirm(f"Drop {turns} and ask again?"):
                raise ContextLengthExceeded(
                    f"nothing was sent; \\forget {count} drops {turns} to make room"
                ) from None
            self.change(self.session.conversation.without_first(count))
            return self._answer(events(), message, sampling, undone)

    def _turns_to_drop(self, message: Message, undone: int) -> int | None:
        """Turns that must go; the last `undone` are replaced anyway."""
        chat = self.session.conversation
        kept = len(chat.turns) - undone
        room = min(self.sampling.max_new_tokens, ANSWER_ROOM)
        for wanted in (room, 1):
            count = self.session.turns_over_budget(message, wanted)
            if count is not None:
                return min(count, kept)
        return None

    def _answer(
        self, events: Iterator[Event], message: Message, sampling: SamplingParams, undone: int
    ) -> bool:
        before = self.session.conversation
        base = before.without_last() if undone else before
        text: list[str] = []

        def unfinished() -> Conversation:
            return base.plus(Turn(message, "".join(text), "interrupted"))

        def on_text(piece: str) -> None:
            text.append(piece)
            self.keeper.save_sometimes(unfinished)

        self.keeper.save(unfinished())
        try:
            self.last = self.screen.answer(
                events, self.session.interrupt, on_text, is_json=sampling.schema is not None
            )
        except MmchatError:
            self.keeper.save(before)
            raise
        except BaseException:  # the program ends; what was said so far is kept
            self.keeper.save(unfinished())
            raise
        self.keeper.save(self.session.conversation)
        kept = self.session.conversation is not before
        positions = self.session.loaded.max_seq_len
        self._answered_with = self.session.conversation, sampling
        if note := facts.ending(self.last, sampling, positions, kept=kept):
            self.screen.note(note)
        return kept

    def resume(
        self,
        saved: saving.SavedChat,
        path: Path,
        given: Collection[str] = (),
    ) -> None:
        """Go on with the chat that was saved at `path`, and its settings.

        What follows is saved there if that is in the folder of chats, else as a new chat. given:
        settings that stay as they are.
        """
        self.written = {("chat", path.resolve())}
        self.keeper.start_new()
        if path.parent == self.keeper.chats:
            self.keeper.go_on(path)
        taken = {name: value for name, value in saved.settings.items() if name not in given}
        self.sampling = replace(self.sampling, **taken)
        self.change(saved.conversation)
        turns, images = saved.conversation.turns, saved.conversation.images
        counts = f"{plural(len(turns), 'turn')} with {plural(len(images), 'picture')}"
        self.screen.note(f"going on after {counts}")
        if taken:
            self.screen.note(f"as before: {settings.listed(taken)}")
        if saved.model != self.spec.name:
            self.screen.note(f"the answers so far are by {saved.model}")
        if turns and turns[-1].reason == "interrupted":
            self.screen.note("the last answer is not complete; \\retry answers again")
        if turns:
            self.screen.turn(facts.question_line(turns[-1].question), turns[-1].answer)

    def change(self, chat: Conversation) -> None:
        """Another state of the conversation, saved at once."""
        self.session.conversation = chat
        self.keeper.save(chat)

    def pictures(self) -> list[Image]:
        """All pictures by number: those of the conversation, then those attached."""
        return self.session.conversation.images + self.attached

    def exchange(self, number: int, image: Image | None) -> None:
        """Replace picture `number` or take it out."""
        asked = len(self.session.conversation.images)
        if not 1 <= number <= len(self.pictures()):
            raise UsageError(f"there is no picture {number}; \\images lists them")
        if number <= asked:
            self.change(self.session.conversation.with_image(number, image))
        else:
            at = number - asked - 1
            self.attached[at : at + 1] = [image] if image else []
